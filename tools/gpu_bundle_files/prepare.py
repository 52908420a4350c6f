"""On the machine with the GPU: say what is missing, install what the bundle has of it, unpack the model.

Needs no package but pip, torch and transformers with what they bring. Nothing of the machine is changed: packages
go into a folder of their own, and no index is asked.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import lzma
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def problems(manifest: dict[str, Any]) -> list[str]:
    """Return what keeps the bundle from running here at all."""
    found = []
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if version != manifest["python"]:
        found.append(
            f"the bundle is for Python {manifest['python']}, and {sys.executable} is {version}: set PYTHON=..., or "
            f"build it with --python {version}"
        )
    if sys.platform != "linux" or platform.machine() != "x86_64":
        found.append(f"the bundle is for Linux on x86-64, and this is {sys.platform} on {platform.machine()}")
    missing = [name for name in manifest["needed_modules"] if importlib.util.find_spec(name) is None]
    if missing:
        found.append(f"{sys.executable} lacks {', '.join(missing)}, which a machine with torch and transformers has")
    return found


def lacking(wheels: dict[str, dict[str, str]]) -> list[str]:
    """Return the bundled packages that this machine has not, or in a version that does not do."""
    from packaging.specifiers import SpecifierSet

    found = []
    for name, wheel in wheels.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(name)
            continue
        if not SpecifierSet(wheel["specifier"]).contains(version, prereleases=True):
            found.append(name)
    if {"pydantic", "pydantic-core"} & set(found):  # they only work as a pair
        found += [name for name in ("pydantic", "pydantic-core") if name in wheels and name not in found]
    return found


def install(manifest: dict[str, Any], site: Path) -> None:
    """Install what is lacking into a folder, from the bundle alone."""
    names = lacking(manifest["wheels"])
    print(f"there already: {', '.join(sorted(set(manifest['wheels']) - set(names))) or 'nothing of the bundle'}")
    print(f"installed from the bundle: {', '.join(names) or 'nothing'}", flush=True)
    site.mkdir(parents=True, exist_ok=True)
    if names:
        files = [str(HERE / "wheels" / manifest["wheels"][name]["file"]) for name in names]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
             "--no-cache-dir", "--disable-pip-version-check", "--root-user-action", "ignore", "--target", str(site),
             *files], check=True,
        )


def unpack_model(manifest: dict[str, Any], cache: Path) -> None:
    """Copy the cache and write the model's weights: those of the bundle, or random ones of the same shapes."""
    import safetensors.torch
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    shutil.copytree(HERE / "cache", cache, dirs_exist_ok=True)
    folder = cache / "models" / manifest["model"]
    if manifest["weights"] == "random":
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder))
        model.save_pretrained(folder)
        print("weights of the model: random, from a seed; times are real, what the benchmark's model predicts is not")
        return
    weights = {}
    tensors = safetensors.torch.load(lzma.decompress((folder / "model.int8.xz").read_bytes()))
    for key, tensor in tensors.items():
        kind, _, name = key.partition(":")
        if kind == "codes":
            weights[name] = tensor.float() * tensors[f"scale:{name}"]
        elif kind == "plain":
            weights[name] = tensor
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.int8.xz").unlink()
    print("weights of the model: the published ones, rounded to 8 bits")


def still_missing(site: Path, source: Path) -> list[str]:
    """Return the modules that the tests and the benchmark import and this machine still cannot."""
    modules = ("raylora.engine.run.plan_run", "raylora.ensemble.outputs.classes", "deepspeed", "bitsandbytes", "peft",
               "pytest", "pytest_timeout", "tensorboardX", "psutil")
    found = []
    for module in modules:
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(source), str(site)]}; import {module}"],
            capture_output=True, text=True, check=False,
        )
        if done.returncode:
            found.append(f"{module}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return found


def describe(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what this machine is, and say what its GPU will do without."""
    import torch
    import transformers

    cuda = (torch.version.cuda or "").replace(".", "")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    print(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    if gpu is None:
        print("no CUDA device: the GPU tests will skip themselves, the benchmark runs on the processor")
    else:
        print(f"gpu: {gpu}, CUDA {torch.version.cuda}")
        if cuda not in manifest["cuda"] and "bitsandbytes" in lacking(manifest["wheels"]):
            print(f"missing: bitsandbytes has no library for CUDA {torch.version.cuda} in this bundle, and nf4 and "
                  f"int8 will fail: build it with --cuda {cuda}")
    return {"gpu": gpu, "cuda": torch.version.cuda, "torch": torch.__version__, "commit": manifest["commit"],
            "transformers": transformers.__version__, "weights": manifest["weights"]}


def main() -> None:
    """Prepare a work folder, or say why it cannot be done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    manifest = json.loads((HERE / "manifest.json").read_text())
    found = problems(manifest)
    if found:
        raise SystemExit("\n".join(f"missing: {line}" for line in found))
    facts = describe(manifest)
    site, source = options.work / "site", options.work / "src"
    install(manifest, site)
    shutil.copytree(HERE / "src", source, dirs_exist_ok=True)
    found = still_missing(site, source)
    if found:
        raise SystemExit("\n".join(f"missing: {line}" for line in found))
    unpack_model(manifest, options.work / "cache")
    (options.out / "machine.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
