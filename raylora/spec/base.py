"""The pydantic foundation of every spec: frozen, strict about unknown keys, and open to registered kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PrivateAttr,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.functional_validators import BeforeValidator
from pydantic_core import CoreSchema, PydanticCustomError

from raylora import registry
from raylora.errors import SpecError


class Frozen(BaseModel):
    """A spec is a value: it cannot change after it was read, and a misspelt key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Located(Frozen):
    """A spec that names local files or folders, and knows where they are; see :mod:`raylora.spec.paths`."""

    _places: dict[str, str] = PrivateAttr(default_factory=dict)  # where things lie is no part of what a spec says

    def __eq__(self, other: object) -> bool:
        """Return whether both say the same, wherever they look for it."""
        return type(self) is type(other) and self.__dict__ == other.__dict__

    @property
    def places(self) -> Mapping[str, str]:
        """Paths as they are written -> where they were found."""
        return self._places

    def look_in(self, places: Mapping[str, str]) -> None:
        """Look for the paths in these places from now on."""
        self._places.update({path: places[path] for path in self.local_paths() if path in places})

    def local_paths(self) -> list[str]:
        """Return the paths as they are written."""
        raise NotImplementedError


def said_by(error: ValidationError) -> str:
    """Return in one line what pydantic refuses, each with its key."""
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, one["loc"])), one["msg"].removeprefix("Value error, "))))
        for one in error.errors()
    )


class KindSpec(Frozen):
    """A spec chosen by its ``kind``; subclasses live beside what they build and are found by the registry."""

    kind: str
    """Which kind it is."""


class AdapterSpec(KindSpec):
    """What every adapter kind shares: where it is attached, and how much is dropped on the way in."""

    target_modules: str | list[str] = "auto"
    """``auto`` (the architecture's attention projections), ``all-linear``, or names / name endings."""
    layers: str | dict[str, int] = "all"
    """``all``, or ``{last: k}`` to adapt only the k blocks nearest the output."""
    dropout: float = 0.0
    """Dropout on the adapter's input, per member, in [0, 1)."""

    @property
    def variant(self) -> str:
        """What tells it from other adapters by name: its kind, unless a kind has several methods."""
        return self.kind


class QuantizationSpec(KindSpec):
    """How the frozen base's weights are stored."""

    is_dense: ClassVar[bool] = False
    """Whether the weights stay plain numbers, which can be read and trained as they are."""
    reads_calibration: ClassVar[bool] = False
    """Whether weights cannot be rounded without calibration text."""


class GridSpec(QuantizationSpec):
    """Weights on an evenly spaced grid of 2, 3 or 4 bits, prepared once per base and kept beside the runs."""

    bits: Literal[2, 3, 4] = 4
    """Bits per weight, the scales apart."""
    group_size: int | Literal["channel"] = 64
    """How many weights of a row share a scale and a zero point; ``channel`` is the whole row."""

    @field_validator("group_size")
    @classmethod
    def _enough_for_a_grid(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 8:
            raise ValueError(f"{value} weights per scale: use at least 8 (64 is usual), or 'channel'")
        return value

    def group_of(self, in_features: int) -> int:
        """Return how many weights share a scale in a layer of this width."""
        return in_features if self.group_size == "channel" else min(int(self.group_size), in_features)


class CompensationSpec(KindSpec):
    """A low-rank pair that makes up for what quantization lost, computed once per base."""

    rounds_itself: ClassVar[bool] = False
    """Whether it takes the grid's place, and of the quantization no more than bits and groups."""
    reads_full_model: ClassVar[bool] = False
    """Whether it compares with what layers read where nothing is quantized."""
    tunes_together: ClassVar[bool] = False
    """Whether its pairs are tuned together when all blocks are quantized."""

    rank: int = Field(default=64, ge=1)
    """Rank of the pair at every quantized layer."""
    trainable: bool = False
    """False: the pair is frozen and belongs to the base, under every member. True: it is where a member's own LoRA
    starts, as in the CLoQ paper; members then start alike."""
    start: Literal["solved", "fresh"] = "solved"
    """How the pair's product is shared out between a member's factors, where it is ``trainable``: ``solved`` leaves
    them as the method gives them; ``fresh`` gives A's rows the length that a newly drawn LoRA's have and B the rest,
    whatever the method. Products are equal; optimizers that normalize their steps move them differently."""


class TrackerSpec(KindSpec):
    """Where the numbers of a run are shown while it goes on; no part of what it computes."""


class TaskSpec(KindSpec):
    """What a row means and what the model is asked for."""

    max_length: int = Field(default=128, ge=2)
    """Tokens kept per row; longer rows are truncated, counted and reported."""


class Seam:
    """Pydantic hook: resolve a mapping to the registered spec class of its ``kind``, or of what an alias stands for."""

    def __init__(self, seam: str, default: str) -> None:
        self.seam, self.default = seam, default

    def resolve(self, value: Any, info: ValidationInfo) -> Any:
        """Return the validated spec of a kind, from a mapping or the kind's name."""
        if isinstance(value, KindSpec):
            return value
        if isinstance(value, str):  # `quantization: nf4` reads better than a mapping of one key
            value = {"kind": value}
        if not isinstance(value, dict):
            raise PydanticCustomError("kind_type", "expected a mapping with a 'kind', or the kind's name")
        kind = value.get("kind", self.default)
        if not isinstance(kind, str):
            raise PydanticCustomError("kind_type", "'kind' must be a name")
        try:
            value = registry.long_form(self.seam, {**value, "kind": kind})
            spec_class = registry.load(self.seam, value["kind"]).Spec
        except SpecError as error:
            says = "; ".join(filter(None, (error.message, error.hint)))
            raise PydanticCustomError("unknown_kind", says.replace("{", "(").replace("}", ")")) from None
        return spec_class.model_validate(value, context=info.context)

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict:
        aliases = registry.ALIASES.get(self.seam, {})
        variants = [_schema(self.seam, kind) for kind in registry.kinds(self.seam)]
        variants += [_alias_schema(_schema(self.seam, alias.kind), name, alias) for name, alias in aliases.items()]
        names = [*registry.kinds(self.seam), *aliases]  # `quantization: nf4` is short for a mapping
        return {"anyOf": [{"type": "string", "enum": names}, *variants]}


def _schema(seam: str, kind: str) -> dict:
    schema: dict = registry.load(seam, kind).Spec.model_json_schema(ref_template="#/$defs/{model}")
    return schema


def _alias_schema(schema: dict, name: str, alias: registry.Alias) -> dict:
    properties = {**schema["properties"], "kind": {"const": name}, **{key: {"type": "number"} for key in alias.names}}
    return {**schema, "title": name, "description": alias.says, "properties": properties, "required": ["kind"]}


def _field(base: Any, seam: str, default: str) -> Any:
    hook = Seam(seam, default)
    return Annotated[SerializeAsAny[base], BeforeValidator(hook.resolve), hook]  # type: ignore[misc]


if TYPE_CHECKING:  # what a checker may rely on; the concrete class is known to the registry alone
    AnyAdapter: TypeAlias = AdapterSpec
    AnyQuantization: TypeAlias = QuantizationSpec
    AnyCompensation: TypeAlias = CompensationSpec
    AnyTask: TypeAlias = TaskSpec
    AnyLoss: TypeAlias = KindSpec
    AnyTracker: TypeAlias = TrackerSpec
else:
    AnyAdapter = _field(AdapterSpec, "adapter", "lora")
    AnyQuantization = _field(QuantizationSpec, "quantization", "none")
    AnyCompensation = _field(CompensationSpec, "compensation", "cloq")
    AnyTask = _field(TaskSpec, "task", "classification")
    AnyLoss = _field(KindSpec, "loss", "kl")
    AnyTracker = _field(TrackerSpec, "tracker", "tensorboard")
