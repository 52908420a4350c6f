"""The bundle for a machine with a GPU: whole, small, and installable without an index."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch

TOOLS = Path(__file__).parents[2] / "tools"


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


if sys.version_info < (3, 11):
    pytest.skip("the tool reads pyproject.toml with Python 3.11's tomllib", allow_module_level=True)
bundle = loaded(TOOLS / "gpu_bundle.py")
prepare = loaded(TOOLS / "gpu_bundle_files" / "prepare.py")


def write_wheel(folder: Path, name: str = "thing", requires: tuple[str, ...] = (), **extra: str) -> Path:
    """Write a wheel with one module, a library and a test."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}/__init__.py": "ANSWER = 42\n",
        f"{name}/lib_cuda128.so": "large",
        f"{name}/tests/test_it.py": "assert True\n",
        f"{info}/METADATA": "".join([f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
                                     *(f"Requires-Dist: {one}\n" for one in requires)]),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **extra,
    }
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, content in files.items():
            wheel.writestr(member, content)
        wheel.writestr(f"{info}/RECORD", "".join(f"{member},,\n" for member in files) + f"{info}/RECORD,,\n")
    return path


# --- wheels ----------------------------------------------------------------------------------------------
def test_a_stripped_wheel_installs_without_an_index_and_lists_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "stripped").mkdir()
    stripped = tmp_path / "stripped" / "thing-1.0-py3-none-any.whl"
    bundle.strip_wheel(write_wheel(tmp_path), stripped, ["*/tests/*", "thing/lib_cuda128.so"])
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, stripped],
        check=True,
    )
    assert sorted(p.name for p in (site / "thing").iterdir() if p.name != "__pycache__") == ["__init__.py"]
    with zipfile.ZipFile(stripped) as wheel:
        names = wheel.namelist()
        listed = [line.rsplit(",", 2) for line in wheel.read("thing-1.0.dist-info/RECORD").decode().splitlines()]
        sizes = {name: len(wheel.read(name)) for name in names}
    assert [name for name, _, _ in listed] == names and not any("tests" in name for name in names)
    assert all(digest.startswith("sha256=") and int(size) == sizes[name] for name, digest, size in listed[:-1])


def test_equal_content_makes_an_equal_file(tmp_path: Path) -> None:
    whole = write_wheel(tmp_path)
    for name in ("one", "two"):
        bundle.strip_wheel(whole, tmp_path / name, ["*/tests/*"])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_of_bitsandbytes_only_the_wanted_cuda_stays() -> None:
    from fnmatch import fnmatchcase

    dropped = bundle.other_cuda("bitsandbytes", ["130", "128"])
    libraries = ["cpu", "cuda118", "cuda128", "cuda130", "cuda132", "rocm72", "xpu2025"]
    kept = [lib for lib in libraries
            if not any(fnmatchcase(f"bitsandbytes/libbitsandbytes_{lib}.so", pattern) for pattern in dropped)]
    assert kept == ["cpu", "cuda128", "cuda130"] and bundle.other_cuda("scipy", ["130"]) == ()


def test_wheels_that_need_more_are_refused(tmp_path: Path) -> None:
    wheels = [write_wheel(tmp_path, "one", ("torch>=2", "two", "old; python_version < '3.9'", "more; extra == 'all'")),
              write_wheel(tmp_path, "two", ("three>=1",))]
    with pytest.raises(bundle.BundleError, match=r"the wheels need more: three \(for two\)"):
        bundle.check_whole(wheels, "3.12", ())
    bundle.check_whole(wheels, "3.12", ["three"])


def test_every_wheel_has_a_pin_and_raylora_a_say() -> None:
    pins = bundle.pinned(bundle.ROOT / "constraints.txt", "3.12")
    assert set(bundle.WHEELS) <= set(pins)
    older = bundle.pinned(bundle.ROOT / "constraints.txt", "3.10")
    assert pins["scipy"] != older["scipy"]
    says = bundle.specifiers(bundle.ROOT / "pyproject.toml")
    assert says["peft"].startswith(">=") and says["pytest"].startswith(">=")


# --- the size --------------------------------------------------------------------------------------------
def test_a_bundle_over_its_limit_is_refused_with_its_largest_files(tmp_path: Path) -> None:
    folder = tmp_path / "gpu-bundle"
    folder.mkdir()
    (folder / "small").write_bytes(b"x" * 10)
    (folder / "large.whl").write_bytes(torch.randint(256, (5000,), dtype=torch.uint8).numpy().tobytes())
    archive = bundle.pack(folder)
    bundle.check_size(folder, archive, 10_000)
    with pytest.raises(bundle.BundleError, match=r"(?s)more than 0 MB; the largest files: large\.whl .*--without"):
        bundle.check_size(folder, archive, 5_000)


def test_what_is_refused_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole").mkdir()
    write_wheel(tmp_path / "whole")
    monkeypatch.setattr(bundle, "WHEELS", ("thing",))
    monkeypatch.setattr(bundle, "pinned", lambda constraints, python: {"thing": "1.0"})
    monkeypatch.setattr(bundle, "download", lambda *ignored: tmp_path / "whole" / "thing-1.0-py3-none-any.whl")
    monkeypatch.setattr(bundle, "rounded_weights", lambda path: b"weights" * 1000)  # half a minute's work
    target = tmp_path / "dist" / "gpu-bundle"
    with pytest.raises(bundle.BundleError, match="the largest files"):
        bundle.build(target, "3.12", ["130"], (), limit_bytes=100_000)
    assert not list(target.parent.iterdir())
    manifest = bundle.build(target, "3.12", ["130"], (), limit_bytes=30_000_000)
    assert sorted(p.name for p in target.parent.iterdir()) == ["gpu-bundle", "gpu-bundle.tar.gz"]
    assert manifest.weights == "8-bit" and json.loads((target / "manifest.json").read_text())["cuda"] == ["130"]
    assert (target / "src" / "tests" / "gpu" / "test_gpu.py").is_file() and (target / "run.sh").stat().st_mode & 0o100
    assert not list((target / "src").rglob("*.png"))
    assert list((target / "cache" / "datasets").glob("movie-reviews-*.jsonl"))


# --- the other machine -----------------------------------------------------------------------------------
def test_weights_come_back_to_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a.weight": torch.randn(7, 40), "a.bias": torch.randn(7), "ids": torch.arange(5)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    folder = tmp_path / "cache" / "models" / "m"
    folder.mkdir(parents=True)
    (folder / bundle.WEIGHTS).write_bytes(bundle.rounded_weights(tmp_path / "model.safetensors"))
    monkeypatch.setattr(prepare, "HERE", tmp_path)
    prepare.unpack_model({"model": "m", "weights": "8-bit"}, tmp_path / "work")
    found = safetensors.torch.load_file(tmp_path / "work" / "models" / "m" / "model.safetensors")
    assert found.keys() == tensors.keys() and torch.equal(found["a.bias"], tensors["a.bias"])
    step = tensors["a.weight"].abs().amax(1, keepdim=True) / 127
    assert bool(((found["a.weight"] - tensors["a.weight"]).abs() <= 0.51 * step).all())
    assert not list((tmp_path / "work").rglob("*.xz"))


def test_without_weights_the_model_has_its_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder = tmp_path / "cache" / "models" / "m"
    shutil.copytree(tiny_model("bert"), folder)
    before = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(prepare, "HERE", tmp_path)
    prepare.unpack_model({"model": "m", "weights": "random"}, tmp_path / "work")
    found = safetensors.torch.load_file(tmp_path / "work" / "models" / "m" / "model.safetensors")
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in before.items()}
    assert "random" in capsys.readouterr().out


def test_only_what_the_machine_lacks_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheels").mkdir()
    wheel = write_wheel(tmp_path / "wheels")
    wheels = {"thing": {"file": wheel.name, "specifier": ""}, "pytest": {"file": "p.whl", "specifier": ">=8"},
              "torch": {"file": "t.whl", "specifier": ">=999"}}
    assert prepare.lacking(wheels) == ["thing", "torch"]
    del wheels["torch"]
    monkeypatch.setattr(prepare, "HERE", tmp_path)
    prepare.install({"wheels": wheels}, tmp_path / "site")
    assert (tmp_path / "site" / "thing" / "__init__.py").is_file() and not (tmp_path / "site" / "pytest").exists()


def test_what_is_missing_is_said_at_once() -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert prepare.problems({"python": here, "needed_modules": ["torch"]}) == []
    found = prepare.problems({"python": "2.7", "needed_modules": ["torch", "no_such_module"]})
    assert len(found) == 2 and f"--python {here}" in found[0] and "lacks no_such_module" in found[1]
