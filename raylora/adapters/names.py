"""What people call each kind of adapter: the one table that pages and records are written from."""

from __future__ import annotations

from dataclasses import dataclass

from raylora.spec import AdapterSpec


@dataclass(frozen=True)
class AdapterName:
    """A kind of adapter in words."""

    name: str
    member: str = ""
    """One member of this kind; by default the name."""
    members: str = "adapters"
    """What several of them are."""
    base: str = "on one frozen base"
    """What they are trained on."""
    article: str = "A"

    @property
    def one(self) -> str:
        """What a sentence calls one member."""
        return self.member or self.name


NAMES: dict[str, AdapterName] = {
    "lora": AdapterName("LoRA", members="low-rank adapters"),
    "mos": AdapterName("MoS"),
    "prolora": AdapterName("PRoLoRA"),
    "melora": AdapterName("MELoRA"),
    "lora_xs": AdapterName("LoRA-XS"),
    "nola": AdapterName("NOLA"),
    "boosted_lora": AdapterName("XGBLoRA", article="An"),
    "full": AdapterName("full fine-tuning", "fully fine-tuned model", "whole models", "from one base"),
    "none": AdapterName("head-only", "head", "heads"),
    # PEFT's methods, and what some of LoRA's options make of it
    "LORA": AdapterName("LoRA", members="low-rank adapters"),
    "DORA": AdapterName("DoRA"),
    "RSLORA": AdapterName("rsLoRA"),
    "PISSA": AdapterName("PiSSA"),
    "OLORA": AdapterName("OLoRA", article="An"),
    "VERA": AdapterName("VeRA"),
    "VBLORA": AdapterName("VB-LoRA"),
    "RANDLORA": AdapterName("RandLoRA"),
    "LOHA": AdapterName("LoHa"),
    "LOKR": AdapterName("LoKr"),
    "HIRA": AdapterName("HiRA"),
    "MISS": AdapterName("MiSS"),
    "GRALORA": AdapterName("GraLoRA"),
    "FOURIERFT": AdapterName("FourierFT"),
    "IA3": AdapterName("IA³", article="An"),
    "OFT": AdapterName("OFT", article="An"),
    "HRA": AdapterName("HRA", article="An"),
    "ROAD": AdapterName("RoAd"),
}
"""By :attr:`AdapterSpec.variant`."""


def adapter_name(spec: AdapterSpec) -> AdapterName:
    """Return what the adapter of a spec is called; one that is not in the table, by its kind."""
    return NAMES.get(spec.variant) or AdapterName(spec.variant)


def named(name: str) -> AdapterName:
    """Return what is said of an adapter by its name."""
    return next((one for one in NAMES.values() if one.name == name), AdapterName(name))
