"""One Ray cluster for the whole session, with its dashboard, since jobs are submitted through it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_TRIES = 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start Ray once and return the dashboard's address.

    HOME is a temporary folder: Ray writes an authentication token into it. The model cache stays where it is.
    Ray has a folder of its own, too, with the file that says which cluster is the current one: without it, the drivers
    of jobs are sent to any cluster that happens to be on this machine.
    """
    import ray

    from raylora.actors.coordinator import NAMESPACE
    from raylora.data.catalog.assets import cache_folder

    os.environ["RAYLORA_CACHE"] = str(cache_folder())
    before, os.environ["HOME"] = os.environ["HOME"], str(tmp_path_factory.mktemp("home"))
    os.environ["RAY_PROFILING"] = "1"  # Ray's timeline keeps what is marked in it, as a test wants to see
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: sockets are in it
    for attempt in range(_TRIES):
        try:
            context = ray.init(
                address="local", num_cpus=2, num_gpus=0, include_dashboard=True, dashboard_port=0,
                namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR", _temp_dir=str(folder),
                _system_config={"metrics_report_interval_ms": 4000},
            )
            break
        except Exception:  # a busy machine can start Ray too slowly for its own time limits
            ray.shutdown()
            if attempt == _TRIES - 1:
                raise
    (folder / "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)
    yield f"http://{context.dashboard_url}"
    ray.shutdown()
    os.environ["HOME"] = before
    del os.environ["RAY_PROFILING"]
    shutil.rmtree(folder, ignore_errors=True)
