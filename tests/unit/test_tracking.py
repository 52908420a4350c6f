"""Trackers: they show what the members' histories hold, once, and never stand in the way of a run."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from run_helpers import assert_bit_equal, members, run, stop_at

from raylora import registry
from raylora.engine.run import tracking as tracking_module
from raylora.engine.run.plan_run import prepare
from raylora.errors import Interrupted, SpecError
from raylora.spec import TrackerSpec, parse_spec
from raylora.store.run_store import RunStore

Make = Callable[..., Any]
EVERY_2 = {"every_steps": 2, "num_to_keep": 2}
EPOCHS = {"lr": 0.005, "epochs": 2, "micro_batch": 8}


# --- what is written -------------------------------------------------------------------------------------
def records(content: bytes) -> Iterator[Any]:
    """Yield the events of a file: length, checksum, protobuf, checksum; a torn last one is left out."""
    from tensorboardX.proto.event_pb2 import Event

    position = 0
    while position + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, position)
        body = content[position + 12 : position + 12 + length]
        if len(body) == length:
            yield Event.FromString(body)
        position += 16 + length


def scalars(files: dict[str, bytes]) -> dict[str, list[tuple[int, float]]]:
    """Read a folder's event files as TensorBoard does: a start takes back the events from its step on."""
    found: list[tuple[str, int, float]] = []
    for name in sorted(files):
        for event in records(files[name]):
            if event.WhichOneof("what") == "session_log":
                found = [one for one in found if one[1] < event.step]
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value if v.HasField("simple_value")]
    return {tag: [(step, value) for t, step, value in found if t == tag] for tag, _, _ in found}


def event_files(uri: str, subject: str) -> dict[str, bytes]:
    storage = RunStore(uri).storage
    folder = f"tensorboard/{subject}"
    return {name: storage.read(f"{folder}/{name}") for name in storage.list(folder)}


def history(uri: str, member: str) -> dict[str, list[tuple[int, Any]]]:
    """Return a member's recorded history in the tracker's names."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for record in json.loads(RunStore(uri).load_result(f"members/{member}")["member.json"])["history"]:
        for key, value in record.items():
            name = key.replace("validation_", "validation/") if key.startswith("validation_") else f"train/{key}"
            found.setdefault(name, []).append((record["step"], pytest.approx(value, rel=1e-6)))
    del found["train/step"]
    return found


def assert_shows_the_history(uri: str, member: str) -> None:
    shown = scalars(event_files(uri, member))
    speed = shown.pop("train/pack_tokens_per_s")
    expected = history(uri, member)
    assert shown == expected and {"train/loss", "train/lr", "train/grad_norm", "validation/nll"} <= set(shown)
    assert [step for step, _ in speed] == [step for step, _ in expected["train/loss"]]
    assert all(value > 0 for _, value in speed)


def test_tensorboard_shows_histories_results_and_the_spec(make_spec: Make) -> None:
    spec = make_spec(optimization=EPOCHS)
    metrics = run(spec)
    uri = RunStore.for_spec(spec).uri
    assert RunStore(uri).storage.list("tensorboard") == ["ensemble", "member-000", "member-001"]
    for member in ("member-000", "member-001"):
        assert_shows_the_history(uri, member)
        (content,) = event_files(uri, member).values()
        (text,) = [v for e in records(content) for v in e.summary.value if v.metadata.plugin_data.plugin_name == "text"]
        assert "lr: 0.005" in text.tensor.string_val[0].decode()
    shown = scalars(event_files(uri, "ensemble"))
    nll = metrics["ensemble"]["eval"]["test"]["nll"]
    assert shown["test/nll"] == [(0, pytest.approx(nll, rel=1e-6))] and "test/accuracy" in shown


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.slow
def test_a_resumed_run_goes_on_without_a_step_twice(make_spec: Make, stop: int) -> None:
    spec = make_spec(checkpointing=EVERY_2)
    with pytest.raises(Interrupted):
        run(spec, stop_at(stop))
    uri = RunStore.for_spec(spec).uri
    assert [step for step, _ in scalars(event_files(uri, "member-001"))["train/loss"]] == list(range(1, stop + 1))
    run(spec)
    for member in ("member-000", "member-001"):
        assert_shows_the_history(uri, member)
        assert len(event_files(uri, member)) == 2


def test_steps_lost_in_a_crash_are_taken_back(make_spec: Make) -> None:
    class Killed(BaseException):
        pass

    def kill(progress: Any) -> None:
        if progress.done == 5:
            raise Killed

    spec = make_spec(checkpointing=EVERY_2)
    with pytest.raises(Killed):
        run(spec, kill)
    uri = RunStore.for_spec(spec).uri
    assert scalars(event_files(uri, "member-000"))["train/loss"][-1][0] == 5  # only 4 is committed
    for path in Path(uri, "tensorboard", "member-000").iterdir():
        path.write_bytes(path.read_bytes()[:-7])  # the last record is torn
    run(spec)
    assert_shows_the_history(uri, "member-000")


def test_a_run_directory_elsewhere_gets_the_files_at_its_commits(make_spec: Make) -> None:
    fs = fsspec.filesystem("memory")
    try:
        spec = make_spec(storage_path="memory://tracked", checkpointing=EVERY_2)
        uri = RunStore.for_spec(spec).uri
        with pytest.raises(Interrupted):
            run(spec, stop_at(3))
        assert [step for step, _ in scalars(event_files(uri, "member-000"))["train/loss"]] == [1, 2, 3]
        run(spec)
        for member in ("member-000", "member-001"):
            assert_shows_the_history(uri, member)
        assert "test/nll" in scalars(event_files(uri, "ensemble"))
        assert not list(Path().glob("memory:*"))
    finally:
        fs.rm("/tracked", recursive=True)


def test_an_empty_list_shows_nothing_and_changes_nothing(make_spec: Make, trained: Any) -> None:
    shown = make_spec(name="shown")
    trained(shown)
    hidden = make_spec(name="hidden", tracking=[])
    assert hidden.digest() == shown.digest()
    run(hidden)
    stores = [RunStore.for_spec(spec) for spec in (shown, hidden)]
    assert [store.storage.exists("tensorboard") for store in stores] == [True, False]
    assert_bit_equal(members(shown), members(hidden))
    one, two = (store.read_json("metrics.json") for store in stores)
    assert (one["sets"], one["members"], one["training"]) == (two["sets"], two["members"], two["training"])
    prepare(make_spec(name="shown", tracking=["tensorboard"]))  # the same run, by another word


# --- what goes wrong -------------------------------------------------------------------------------------
def test_a_disk_that_refuses_costs_a_warning_and_no_more(
    make_spec: Make, trained: Any, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make_spec(name="whole")
    trained(whole)
    spec = make_spec(name="refused", checkpointing=EVERY_2)
    with pytest.raises(Interrupted):
        run(spec, stop_at(2))
    folder = Path(RunStore.for_spec(spec).uri, "tensorboard")
    shutil.rmtree(folder)
    folder.write_text("no folder can be made where a file is")
    run(spec)
    (first, *rest) = [r for r in caplog.records if r.name == tracking_module.__name__]
    assert first.levelname == "WARNING" and "tensorboard failed and is told nothing more" in first.getMessage()
    assert "NotADirectoryError" in first.getMessage() and len(rest) == 1  # of the job, and of the results
    assert_bit_equal(members(whole), members(spec))


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register a tracker whose server never answers."""
    from threading import Event
    from typing import Literal

    released = Event()

    class Spec(TrackerSpec):
        kind: Literal["stuck"] = "stuck"

    class Stuck:
        def begin(self, subject: str, after_step: int) -> None:
            released.wait()

    module = types.ModuleType("stuck_tracker")
    vars(module).update(Spec=Spec, check=lambda spec: None, build=lambda spec, run: Stuck())
    monkeypatch.setitem(sys.modules, "stuck_tracker", module)
    monkeypatch.setitem(registry.REGISTRY["tracker"], "stuck", "stuck_tracker")
    monkeypatch.setattr(tracking_module, "_GRACE_S", 0.2)
    yield
    released.set()


@pytest.mark.usefixtures("stuck")
def test_a_server_that_never_answers_holds_nothing_up(make_spec: Make, caplog: pytest.LogCaptureFixture) -> None:
    started = time.monotonic()
    metrics = run(make_spec(tracking=["stuck"]))
    assert metrics["run"]["phase"] == "succeeded" and time.monotonic() - started < 60
    assert any("behind by more than" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("kind", ["mlflow", "wandb", "tensorboard"])
def test_a_missing_package_is_named_before_anything_is_written(
    make_spec: Make, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import util

    package = {"tensorboard": "tensorboardX"}.get(kind, kind)
    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest))
    spec = make_spec(tracking=[kind])
    with pytest.raises(SpecError, match=f"{kind} needs the Python package {package}") as caught:
        prepare(spec)
    assert f"pip install {package}" in caught.value.hint and not Path(spec.storage_path).exists()


def test_the_section_is_checked() -> None:
    good = "base: {source: m}\ntask: {labels: [a, b]}\ndata: {train: {files: a.jsonl}}\n"
    cases = {
        "tracking: [mlflo]": "did you mean 'mlflow'",
        "tracking: [wandb, {kind: wandb, project: p}]": "a kind is given twice",
        "tracking: [{kind: wandb, projekt: p}]": "did you mean 'project'",
        "tracking: [{kind: wandb, api_key: x}]": "looks like a secret",
        "tracking: [{kind: mlflow, uri: 'http://me:word@host'}]": "password does not belong",
    }
    for text, says in cases.items():
        with pytest.raises(SpecError, match=says):
            parse_spec(good + text)
    assert [tracker.kind for tracker in parse_spec(good).tracking] == ["tensorboard"]


# --- with the packages themselves, where they are installed ----------------------------------------------
@pytest.mark.filterwarnings("default")  # its libraries' own
def test_mlflow_has_each_step_once(make_spec: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is optional and not installed")
    pytest.importorskip("sqlalchemy", reason="a database file needs mlflow, not mlflow-skinny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setattr(tracking_module, "_GRACE_S", 120.0)  # it makes its tables first
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    spec = make_spec(tracking=[{"kind": "mlflow", "uri": uri}], checkpointing=EVERY_2)
    with pytest.raises(Interrupted):
        run(spec, stop_at(3))
    run(spec)
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("raylora").experiment_id
    found = {r.info.run_name: r for r in client.search_runs([experiment])}
    assert sorted(found) == ["demo/ensemble", "demo/member-000", "demo/member-001"]
    expected = history(RunStore.for_spec(spec).uri, "member-001")
    run_id = found["demo/member-001"].info.run_id
    for name, values in expected.items():
        assert sorted((m.step, m.value) for m in client.get_metric_history(run_id, name)) == values
    assert found["demo/member-001"].data.params["optimization.lr"] == "0.005"
    assert {r.info.status for r in found.values()} == {"FINISHED"}
    assert "test/nll" in found["demo/ensemble"].data.metrics


def test_mlflow_without_a_place_is_refused(make_spec: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is optional and not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(SpecError, match="not told where to write"):
        prepare(make_spec(tracking=["mlflow"]))


def log_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of LevelDB's log format, which W&B keeps its offline runs in, after seven bytes of its own."""
    position, parts = 7, b""
    while position + 7 <= len(content):
        left = -position % 32768
        if 0 < left < 7:  # too little for a header: the block is padded
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.filterwarnings("default")  # its libraries' own
def test_wandb_offline_has_the_history(make_spec: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is optional and not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(tracking_module, "_GRACE_S", 120.0)
    spec = make_spec(tracking=["wandb"], optimization=EPOCHS)
    run(spec)
    uri = RunStore.for_spec(spec).uri
    (path,) = Path(uri, "wandb").glob("offline-run-*-member-001/*.wandb")
    found: dict[str, list[tuple[int, Any]]] = {}
    expected = history(uri, "member-001")
    for content in log_records(path.read_bytes()):
        record = Record.FromString(content)
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for name in row.keys() & expected.keys():
            found.setdefault(name, []).append((row["_step"], row[name]))
    assert found == expected
