"""What the doctor says of a node's answer; tests/ray asks real nodes."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from raylora.actors.node_facts import NodeFacts, versions_here
from raylora.cli.app import app
from raylora.doctor import findings_of
from raylora.store.probe import Sighting

HERE = versions_here()


def test_a_node_like_this_one_is_fine() -> None:
    assert set(HERE) >= {"python", "ray", "torch", "raylora"}
    (found,) = findings_of(NodeFacts("node-1", HERE, ("H100, 80 GB",)), HERE, "", "")
    assert found.level == "ok" and "1 GPU(s): H100, 80 GB" in found.what


@pytest.mark.parametrize(("facts", "says"), [
    (NodeFacts("node-1", {**HERE, "torch": "2.0.0"}), f"torch 2.0.0 (here {HERE['torch']})"),
    (NodeFacts("node-1", {k: v for k, v in HERE.items() if k != "raylora"}), "raylora none"),
    (NodeFacts("node-1", silence="it has not answered within 5 s"), "has not answered"),
    (NodeFacts("node-1", HERE, sighting=Sighting("node-1", "there is no such run there")), "does not see /data"),
])
def test_what_is_wrong_with_a_node_is_named(facts: NodeFacts, says: str) -> None:
    bad = [found for found in findings_of(facts, HERE, "/data", "nonce") if found.level == "bad"]
    assert len(bad) == 1 and says in bad[0].what and bad[0].what.startswith("node-1: ") and bad[0].hint


def test_a_storage_path_is_seen() -> None:
    found = findings_of(NodeFacts("node-1", HERE, sighting=Sighting("node-1", "nonce")), HERE, "/data", "nonce")
    assert [one.level for one in found] == ["ok", "ok"] and found[1].what == "node-1: sees /data"


def test_without_a_cluster_it_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said = CliRunner().invoke(app, ["doctor", "--cluster"])
    assert said.exit_code == 2 and "RAY_ADDRESS" in said.output
    alone = CliRunner().invoke(app, ["doctor", "--storage-path", "/data"])
    assert alone.exit_code == 2 and "--cluster" in alone.output
