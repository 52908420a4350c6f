"""Logging: silent by default, about a run and its members where somebody asks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from raylora import logs
from raylora.cli import app
from raylora.errors import UsageError


@pytest.fixture(autouse=True)
def _unchanged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root = logging.getLogger("raylora")
    before, level = list(root.handlers), root.level
    monkeypatch.delenv(logs.VARIABLE, raising=False)
    yield
    root.handlers[:] = before
    root.setLevel(level)


def test_nothing_is_set_up_unless_asked_for() -> None:
    before = list(logging.getLogger("raylora").handlers)
    logs.configure()
    assert logging.getLogger("raylora").handlers == before and logs.environment() == {}


def test_a_line_names_the_run_and_its_members(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(logs.VARIABLE, "debug")
    logs.configure()
    logs.configure()  # a second time adds no second handler
    logger = logging.getLogger("raylora.somewhere")
    with logs.about("demo", ["member-000", "member-001"]):
        logger.debug("step %d", 3)
    logger.debug("outside")
    inside, outside = capsys.readouterr().err.splitlines()
    assert inside.endswith("DEBUG raylora.somewhere [demo member-000 member-001]: step 3")
    assert outside.endswith("raylora.somewhere: outside")


def test_an_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, "loud")
    with pytest.raises(UsageError, match="RAYLORA_LOG: there is no level 'LOUD'"):
        logs.configure()
    result = CliRunner().invoke(app, ["schema"])
    assert result.exit_code == UsageError.exit_code and "no level" in result.output


def test_a_run_logs_its_stages(
    make_spec: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    from raylora.engine.run.local_driver import run_in_process
    from raylora.engine.run.plan_run import prepare

    caplog.set_level("INFO", "raylora")
    run_in_process(prepare(make_spec(optimization={"lr": 0.002, "steps": 2, "micro_batch": 8})))
    said = [record.getMessage() for record in caplog.records if record.name == "raylora.engine.run.session"]
    assert any("training from step 0 to 2" in line for line in said)
    assert sum("trained in" in line or "evaluated in" in line for line in said) == 2
