"""``raylora init``: what it writes passes `validate` and trains; what cannot go together is not written."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeps import sweep
from typer.testing import CliRunner

from raylora import registry
from raylora.cli import app
from raylora.engine.run.first_spec import first_spec
from raylora.errors import BaseError, UsageError
from raylora.spec import parse_spec

TINY_FOR = {
    "classification": "bert", "regression": "roberta", "multiple_choice": "llama", "language_modeling": "gpt2",
    "instruction": "gemma3",
}
NOT_ON_GPT2 = {"loha", "lokr", "miss", "oft", "hra", "road"}
"""Methods that PEFT has for layers stored O x I only."""
ADAPTERS = [*registry.kinds("adapter"), *registry.ALIASES["adapter"]]


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("task", registry.kinds("task"))
@pytest.mark.parametrize("adapter", sweep(["", "lora", "mos", "dora"], ["mos", "dora"]))
def test_what_init_writes_is_valid(task: str, adapter: str, tiny_model: Callable[[str], str], tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    chosen = ["--adapter", adapter] if adapter else []
    done = call("init", str(path), "--task", task, "--base", tiny_model(TINY_FOR[task]), *chosen)
    assert done.exit_code == 0, done.output
    found = call("validate", str(path), "--set", f"storage_path={tmp_path}/runs", "--json")
    assert found.exit_code == 0, found.output
    written = yaml.safe_load(path.read_text())
    assert written["task"]["kind"] == task and written["adapter"]["kind"] == (adapter or "lora")
    assert json.loads(found.stdout)["valid"]


@pytest.mark.parametrize("architecture", sweep(["bert", "gpt2", "llama"], ["bert", "llama"]))
@pytest.mark.parametrize("adapter", sweep(ADAPTERS, ["full", "none", "prolora", "vblora", "road", "pissa", "ia3"]))
def test_every_adapter_gets_settings_that_fit_the_layers(
    adapter: str, architecture: str, tiny_model: Callable[[str], str]
) -> None:
    if architecture == "gpt2" and adapter in NOT_ON_GPT2:
        with pytest.raises(BaseError, match="PEFT refuses"):
            first_spec("classification", tiny_model(architecture), adapter)
        return
    text = first_spec("classification", tiny_model(architecture), adapter)
    spec = parse_spec(text)
    module = registry.load("adapter", spec.adapter.kind)
    made: Any = module.build(spec.adapter)
    refuses = getattr(made, "unsupported_reason", None)
    assert spec.base.quantization.kind == ("none" if refuses and refuses(True) else "nf4")
    assert ("target_modules" in yaml.safe_load(text)["adapter"]) == (adapter not in ("full", "none"))


@pytest.mark.parametrize("kind", registry.kinds("adapter"))
def test_the_settings_of_a_first_spec_are_valid_ones(kind: str) -> None:
    module = registry.load("adapter", kind)
    for keys in getattr(module, "FIRST", ({},)):
        module.Spec.model_validate(keys)


@pytest.mark.parametrize(("task", "base"), [
    ("classification", "pypi:minilm-l6"), ("regression", "pypi:minilm-l6"),
    ("multiple_choice", "pypi:smollm2-135m"), ("language_modeling", "pypi:smollm2-135m"),
])
def test_a_task_alone_gets_a_base_and_data_that_fit_it(task: str, base: str) -> None:
    spec = parse_spec(first_spec(task))
    assert (spec.base.source, spec.adapter.kind, spec.base.quantization.kind) == (base, "lora", "nf4")
    assert spec.data.train.source is not None and spec.data.train.source.startswith("pypi:")


def test_an_architecture_without_known_targets_gets_all_linear_layers(tmp_path: Path, tiny_model: Any) -> None:
    import transformers

    folder = tmp_path / "xglm"
    transformers.XGLMForCausalLM(transformers.XGLMConfig(
        vocab_size=30522, d_model=32, num_layers=2, attention_heads=4, ffn_dim=64, max_position_embeddings=40,
    )).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model("llama"))
    tokenizer.model_max_length = 40
    tokenizer.save_pretrained(folder)
    spec = parse_spec(first_spec("language_modeling", str(folder)))
    assert spec.adapter.target_modules == "all-linear"
    assert spec.task.max_length == 40  # no longer than the base can read


@pytest.mark.parametrize(("arguments", "says"), [
    (["--task", "regresion"], "did you mean 'regression'?"),
    (["--adapter", "dorra"], "did you mean 'dora'?"),
    (["--adapter", "adalora"], "which members cannot"),
    (["--base", "pypi:minilm-l7"], "did you mean 'minilm-l6'?"),
    (["--base", "./nowhere"], "there is no folder ./nowhere"),
    (["--task", "language_modeling", "--base", "pypi:minilm-l6"], "is bidirectional"),
    (["--task", "multiple_choice", "--adapter", "none"], "use another adapter"),
])
def test_what_cannot_run_is_refused_and_nothing_is_written(arguments: list[str], says: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    done = call("init", str(path), *arguments)
    assert done.exit_code == 2 and says in done.output, done.output
    assert not list(tmp_path.iterdir()) and "Traceback" not in done.output


def test_without_options_the_commented_template_is_written_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    assert call("init", str(path)).exit_code == 0
    assert path.read_bytes() == (files("raylora") / "spec" / "template.yaml").read_bytes()
    assert call("init", str(path), "--task", "regression").exit_code == 2
    assert path.read_bytes() == (files("raylora") / "spec" / "template.yaml").read_bytes()
    lost = call("init", str(tmp_path / "no" / "spec.yaml"))
    assert lost.exit_code == 2 and "there is no folder" in lost.output


def test_a_first_spec_trains(tmp_path: Path, tiny_model: Callable[[str], str]) -> None:
    path = tmp_path / "spec.yaml"
    assert call("init", str(path), "--base", tiny_model("bert"), "--adapter", "vera").exit_code == 0
    small = ["ensemble.members=2", "data.train_rows=32", "data.validation_rows=16", "data.test_rows=16",
             "optimization.epochs=1", "evaluation.bootstrap_samples=5", f"storage_path={tmp_path}/runs",
             "base.quantization=none", "base.dtype=float32"]
    done = call("run", str(path), "--local", "--json", *(each for key in small for each in ("--set", key)))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["phase"] == "succeeded"


def test_first_spec_raises_usage_errors_only() -> None:
    with pytest.raises(UsageError):
        first_spec(task="poetry")
    with pytest.raises(BaseError):
        first_spec(base="pypi:nothing-like-it")
