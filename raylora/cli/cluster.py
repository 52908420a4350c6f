"""The commands for KubeRay: render a job from a plan, check manifests."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import raylora
from raylora.cli.app import AsJson, Overrides, SpecFile, app, command
from raylora.display.console import err, out
from raylora.errors import PlacementError, UsageError, suggest

_GPU_GB = {"A10": 24, "A100": 80, "A100-40GB": 40, "B200": 180, "H100": 80, "H200": 141, "L4": 24, "L40S": 48,
           "RTX6000": 48, "T4": 16, "V100": 32}
"""What a GPU has, by how people call it."""

_Refused: Any = typer.BadParameter.__base__
"""What the parser raises: typer brings a parser of its own, whose errors it does not name."""

cluster = typer.Typer(no_args_is_help=True, help="Manifests for KubeRay: render one from a plan, check some.")
app.add_typer(cluster, name="cluster")


@cluster.command()
@command
def render(
    spec_file: SpecFile,
    image: Annotated[str, typer.Option(help="The image, tagged with the version of Ray in it.")] = "",
    gpus: Annotated[int, typer.Option(min=0, help="GPUs in all; 0 trains on cores.")] = 0,
    gpu_type: Annotated[str, typer.Option(help="What they are: " + ", ".join(_GPU_GB) + ".")] = "",
    gpu_memory: Annotated[str, typer.Option(help="Of a GPU of another type, such as 96GB.")] = "",
    per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node: at most so many in one pod.")] = 8,
    nodes: Annotated[int, typer.Option(min=1, help="Without GPUs: nodes.")] = 1,
    cpus: Annotated[int, typer.Option(min=1, help="Without GPUs: cores of a node.")] = 8,
    memory: Annotated[str, typer.Option(help="Without GPUs: memory of a node.")] = "32GB",
    storage: Annotated[str, typer.Option(help=(
        "Where runs lie: an object store such as s3://bucket/runs; by default the volume claim, at /runs."
    ))] = "",
    claim: Annotated[str, typer.Option(help="The ReadWriteMany volume claim for runs.")] = "raylora-runs",
    secret: Annotated[str, typer.Option(help="The secret with the object store's keys.")] = "",
    queue: Annotated[str, typer.Option(help="Kueue's queue to wait in.")] = "",
    node_selector: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of nodes; may be repeated.")] = None,
    overrides: Overrides = None,
) -> None:
    """Print a RayJob for a spec: replicas, memory, shared memory and GPUs follow from its plan."""
    from raylora.engine.run.plan_ahead import plan_ahead
    from raylora.kuberay.checking import check_manifests
    from raylora.kuberay.manifests import dump_manifests
    from raylora.kuberay.render import RUNS, Job, pod_size, render_job
    from raylora.spec import dump_spec

    spec = raylora.read_spec(spec_file, overrides or [])
    if storage and "://" not in storage:
        raise UsageError(f"--storage: {storage} is no object store", "give s3://bucket/folder, or --claim")
    on_claim = not storage
    _check_reachable(spec, RUNS if on_claim else "")
    ray = importlib.metadata.version("ray")
    job = Job(
        spec.run_name(), dump_spec(spec), spec.digest(), image or f"raylora{'-cuda' if gpus else ''}:{ray}",
        RUNS if on_claim else storage, claim if on_claim else "", secret, queue, _pairs(node_selector or []),
    )
    inventory = _inventory(gpus, _device(gpu_type, gpu_memory) if gpus else "", per_node, nodes, cpus, memory)
    ahead = plan_ahead(spec, inventory)
    workers_per_pod = per_node if ahead.plan.gpus_per_worker else cpus // ahead.plan.cpus_per_worker
    size = pod_size(ahead.plan, workers_per_pod)
    documents = render_job(job, size)
    problems = check_manifests(documents, ray, parse_entrypoint)
    if problems:
        raise UsageError("; ".join(map(str, problems)), "change the options that it came from")
    for line in (ahead.plan.summary(), *ahead.plan.reasons, *ahead.notes):
        err.print(line, markup=False)
    print(dump_manifests(documents), end="")


@cluster.command()
@command
def check(
    files: Annotated[list[Path], typer.Argument(help="Files with manifests, or folders with a kustomization.yaml.")],
    crds: Annotated[Path | None, typer.Option(help="A folder with KubeRay's CRDs: checks every field, too.")] = None,
    ray_version: Annotated[str, typer.Option(help="The Ray of the image; by default the one installed here.")] = "",
    as_json: AsJson = False,
) -> None:
    """Check manifests against the operator's rules, the restricted level of pod security and raylora's own needs."""
    from raylora.kuberay.checking import check_manifests
    from raylora.kuberay.kustomize import render_kustomization
    from raylora.kuberay.manifests import read_manifests
    from raylora.kuberay.schema import read_definitions

    schemas = read_definitions(crds) if crds is not None else None
    version = ray_version or importlib.metadata.version("ray")
    found = []
    for path in files:
        documents = render_kustomization(path) if path.is_dir() else read_manifests(path)
        found += [f"{path}: {one}" for one in check_manifests(documents, version, parse_entrypoint, schemas)]
    if as_json:
        print(json.dumps({"problems": found}))
    for problem in [] if as_json else found:
        out.print(problem, style="red", markup=False, soft_wrap=True)
    if found:
        raise typer.Exit(UsageError.exit_code)
    if not as_json:
        out.print(f"{len(files)} checked: nothing wrong" + ("" if crds else " (fields need --crds)"))


def parse_entrypoint(words: list[str]) -> Mapping[str, Any]:
    """Return the parameters of a command as the command line takes them; nothing is run.

    Understood are ``raylora COMMAND ...`` and ``python -m raylora COMMAND ...``.

    Raises:
        UsageError: it is no such command.
    """
    words = list(words)
    if words[:1] == ["raylora"]:
        words = words[1:]
    elif words[:1] in (["python"], ["python3"]) and words[1:3] == ["-m", "raylora"]:
        words = words[3:]
    else:
        raise UsageError(f"{' '.join(words[:2]) or 'nothing'!r} is not raylora")
    found: Any = typer.main.get_command(app)
    try:
        context = found.make_context("raylora", words)
        while hasattr(found, "resolve_command"):  # a group, whose context keeps what is left for its command
            name, found, rest = found.resolve_command(context, [*context._protected_args, *context.args])
            context = found.make_context(name, rest, parent=context)
        given: Mapping[str, Any] = context.params
    except _Refused as error:
        raise UsageError(error.format_message()) from None
    except typer.Exit:
        raise UsageError("asks for help, and runs nothing") from None
    if "spec_yaml" in given and (given["spec_file"] is None) == (not given["spec_yaml"]):
        raise UsageError("needs a spec file or --spec-yaml")
    return given


def _check_reachable(spec: Any, mounted: str) -> None:
    """Refuse a spec that names files which no pod of the cluster has."""
    from raylora.spec.paths import local_paths

    unseen = [path for path in local_paths(spec) if not mounted or not path.startswith(f"{mounted}/")]
    if unseen:
        where = f"put it on the volume claim and name it {mounted}/..., " if mounted else ""
        raise UsageError(f"{unseen[0]}: is a local path, which the cluster's pods do not have",
                         f"{where}or use a hub id or an URL")


def _device(gpu_type: str, gpu_memory: str) -> str:
    from raylora.placement.cluster import read_size

    if gpu_memory:
        read_size(gpu_memory, "--gpu-memory")
        return gpu_memory
    if not gpu_type:
        raise UsageError("--gpus needs --gpu-type or --gpu-memory", "such as --gpu-type H100")
    known = {name.upper(): gb for name, gb in _GPU_GB.items()}
    if gpu_type.upper() not in known:
        raise UsageError(f"--gpu-type: {gpu_type!r} is not known; {suggest(gpu_type, _GPU_GB)}",
                         "or give --gpu-memory 96GB")
    return f"{known[gpu_type.upper()]}GB"


def _inventory(gpus: int, device: str, per_node: int, nodes: int, cpus: int, memory: str) -> Any:
    from raylora.kuberay.render import SHM_BYTES
    from raylora.placement.cluster import read_cluster, read_size
    from raylora.placement.inventory import Inventory, Node

    if gpus:
        whole, rest = divmod(gpus, per_node)
        parts = [read_cluster(f"{whole}x{per_node}x{device}")] if whole else []
        parts += [read_cluster(f"{rest}x{device}")] if rest else []
        return Inventory(tuple(node for part in parts for node in part.nodes), f"{gpus} x {device}",
                         assumed=parts[0].assumed)
    size = read_size(memory, "--memory") - SHM_BYTES
    return Inventory(tuple(Node(f"node-{n}", cpus, size) for n in range(nodes)), f"{nodes} node(s)")


def _pairs(texts: list[str]) -> dict[str, str]:
    wrong = [text for text in texts if "=" not in text]
    if wrong:
        raise PlacementError(f"--node-selector: {wrong[0]!r} is not of the form KEY=VALUE")
    return dict(text.split("=", 1) for text in texts)
