"""A prepared base in other programs: transformers and PEFT compute what raylora computes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from sweeps import sweep
from typer.testing import CliRunner

from raylora import registry
from raylora.cli import app
from raylora.engine.model.base import load_base
from raylora.engine.model.quantized_layers import prepared_store
from raylora.engine.quantization.quantize_base import ensure_prepared
from raylora.engine.run.plan_run import prepare
from raylora.errors import RunDirectoryError, UsageError
from raylora.serve.export_base import export_base
from raylora.spec import dump_spec

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
Make = Callable[..., Any]
CPU = torch.device("cpu")
IDS = torch.arange(40, 76).view(2, 18)


@pytest.fixture
def begun(make_spec: Make, tiny_model: Callable[[str], str]) -> Callable[..., Any]:
    """Return a function that begins a run on a prepared base and returns it."""

    def begin(kind: str, bits: int = 3, **changes: Any) -> Any:
        language = {"kind": "language_modeling", "max_length": 32}
        spec = make_spec(**{
            "base__source": tiny_model(kind), "adapter": {"kind": "lora", "rank": 4, "target_modules": "auto"},
            "base__quantization": {"kind": "optq", "bits": bits, "group_size": 16, "magr": False},
            "base__compensation": {"kind": "cloq", "rank": 4},
            "base__calibration": {"source": "pypi:bbc-news", "samples": 8, "length": 32, "held_out": 0},
            **({"task": language} if kind != "bert" else {}), **changes,
        })
        run = prepare(spec)
        run.begin()
        task = registry.load("task", spec.task.kind).build(spec.task)
        if run.base is not None:
            ensure_prepared(spec.base, task, run.base, CPU)
        return run

    return begin


def ours(run: Any) -> torch.Tensor:
    task = registry.load("task", run.spec.task.kind).build(run.spec.task)
    base = load_base(run.spec.base, run.spec.adapter, task, CPU, prepared_store(run.store))
    backbone = getattr(base.model, base.model.base_model_prefix)
    with torch.no_grad():
        return backbone(input_ids=IDS).last_hidden_state


def theirs(model: Any) -> torch.Tensor:
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with torch.no_grad():
        return getattr(inner, inner.base_model_prefix)(input_ids=IDS).last_hidden_state


def loaded(kind: str, folder: str, **options: Any) -> Any:
    auto = transformers.AutoModelForSequenceClassification if kind == "bert" else transformers.AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that read it
        return auto.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_transformers_and_peft_compute_the_same(kind: str, begun: Any, tmp_path: Path) -> None:
    run = begun(kind)
    exported = export_base(run.store.uri, dtype="float32")
    model = loaded(kind, exported.folder)
    without = theirs(model)
    with_pair = theirs(peft.PeftModel.from_pretrained(model, exported.pair_folder))
    torch.testing.assert_close(with_pair, ours(run), rtol=1e-3, atol=1e-3)
    assert (without - with_pair).abs().max() > 0.01
    config = json.loads(Path(exported.pair_folder, "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 4 and config["fan_in_fan_out"] == (kind == "gpt2")


@pytest.mark.parametrize("bits", sweep([2, 3, 4], [3]))
def test_the_packed_form_loads_in_transformers(bits: int, begun: Any) -> None:
    run = begun("llama", bits)
    exported = export_base(run.store.uri, "base-packed", dtype="float32")
    # Left packed, the reader's own set-up expects unpacked zero points (compressed-tensors 0.20).
    dense_on_load = transformers.CompressedTensorsConfig(dequantize=True)
    model = loaded("llama", exported.folder, quantization_config=dense_on_load)
    model = peft.PeftModel.from_pretrained(model, exported.pair_folder)
    torch.testing.assert_close(theirs(model), ours(run), rtol=1e-3, atol=1e-3)
    dense = export_base(run.store.uri, "base", dtype="float32")
    assert exported.size_bytes < dense.size_bytes


def test_what_was_not_quantized_is_copied(begun: Any, tiny_model: Any) -> None:
    run = begun("llama")
    folder = export_base(run.store.uri, dtype="float32").folder
    from safetensors.torch import load_file

    before = load_file(Path(tiny_model("llama"), "model.safetensors"))
    after = load_file(Path(folder, "model.safetensors"))
    assert before.keys() == after.keys()
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert {key for key in before if "proj" not in key} == same
    half = load_file(Path(export_base(run.store.uri, out=str(Path(folder).parent / "half")).folder,
                          "model.safetensors"))
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}


def test_what_cannot_be_exported(begun: Any, make_spec: Make) -> None:
    run = begun("gpt2")
    with pytest.raises(UsageError, match="stored inputs first"):
        export_base(run.store.uri, "base-packed")
    export_base(run.store.uri)
    with pytest.raises(RunDirectoryError, match="already exists"):
        export_base(run.store.uri)
    wide = begun("llama", name="odd", base__quantization={"kind": "rtn", "bits": 4, "group_size": 24},
                 base__compensation=None, base__calibration=None)
    with pytest.raises(UsageError, match="32 inputs are not whole groups of 24"):
        export_base(wide.store.uri, "base-packed")
    assert export_base(wide.store.uri).pair_folder is None
    plain = begun("llama", name="plain", base__quantization="none", base__compensation=None, base__calibration=None)
    with pytest.raises(UsageError, match="quantized by none"):
        export_base(plain.store.uri)


def test_the_command_lines_prepare_and_export(begun: Any, tmp_path: Path) -> None:
    run = begun("llama")
    path = tmp_path / "spec.yaml"
    path.write_text(dump_spec(run.spec))
    cli = CliRunner()
    result = cli.invoke(app, ["prepare", str(path), "--local", "--report", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert Path(found["report"]).exists() and found["base"] == prepared_store(run.store).uri
    result = cli.invoke(app, ["prepare", str(path), "--local"])
    assert result.exit_code == 0 and "self_attn.q_proj (2)" in result.stdout
    result = cli.invoke(app, ["export", run.store.uri, "--format", "base-packed"])
    assert result.exit_code == 0 and "its pair" in result.stdout, result.output
    result = cli.invoke(app, ["prepare", str(path), "--local", "--set", "base.quantization=nf4", "--set",
                              "base.compensation=null", "--set", "base.calibration=null", "--set", "name=other"])
    assert result.exit_code == 2 and "needs no preparation" in result.stderr
