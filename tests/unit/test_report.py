"""The report: complete, self-contained, escaped, tolerant of what is missing, honest about what was gained."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from ensemble_fakes import fake_group, fake_language_group
from rich.console import Console
from sweeps import sweep

from raylora.ensemble import summarize
from raylora.report import console_table, write_report
from raylora.report.entries import columns, entries
from raylora.report.formatting import difference, duration, flat, number, size
from raylora.report.headline import headline
from raylora.spec.evaluation import EvaluationSpec

FEW = EvaluationSpec(bootstrap_samples=50)


def surroundings(members: int) -> dict:
    """Return what a run adds to its summary."""
    training = {
        f"member-{m:03d}": [
            {
                "step": s,
                "loss": 1.4 * math.exp(-s / 60) + 0.3 + 0.05 * math.sin(7 * s + m),
                "lr": 5e-4 * (1 - s / 200),
                "grad_norm": 1 + 0.4 * math.cos(3 * s + m),
                "validation_nll": 0.9 * math.exp(-s / 80) + 0.5 + 0.02 * m if s % 50 == 0 else None,
            }
            for s in range(10, 201, 10)
        ]
        for m in range(members)
    }
    return {
        "run": {
            "name": "topics-5",
            "digest": "9f" * 32,
            "phase": "finished",
            "started_at": "2025-03-01T10:00:00Z",
            "finished_at": "2025-03-01T10:07:31Z",
            "task": "classification",
            "base": "bert-tiny",
            "members_asked": members,
            "members_done": members,
            "degraded": False,
        },
        "spec_yaml": "name: topics-5\nbase:\n  source: bert-tiny\n",
        "versions": {"raylora": "0.1.0", "torch": "2.13.0", "ray": "2.60.0"},
        "machine": {"cpus": 8, "gpus": 0, "memory_bytes": 16 * 2**30},
        "timing": {"total_s": 451.2, "train_s": 380.0, "evaluate_s": 31.5, "start_s": 12.0, "tokens_per_s": 15234.5},
        "memory": {"peak_rss_bytes_per_worker": [2.1e9, 2.2e9], "base_bytes": 120_000_000, "member_bytes": 600_000},
        "parameters": {"base": 28_763_648, "per_member_trainable": 149_508},
        "data": [
            {"name": "train", "role": "train", "rows": 4000, "truncated": 12, "skipped": 0, "duplicates": 3},
            {"name": "test", "role": "test", "rows": 200, "truncated": 0, "skipped": 1, "duplicates": 0},
        ],
        "training": training,
    }


@pytest.fixture(scope="module")
def metrics():
    groups = {
        "ensemble": fake_group(5),
        "mc_dropout": fake_group(3, seed=7, noise=0.6),
        "checkpoints": fake_group(3, seed=8, noise=0.8),
    }
    return json.loads(json.dumps(summarize(groups, FEW) | surroundings(5)))


@pytest.fixture(scope="module")
def written(metrics, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, write_report(metrics, folder)


class Page(HTMLParser):
    """Collect tags, attributes and text, and check that what was opened is closed."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, html):
        super().__init__()
        self.open, self.images, self.headings, self.links, self.words = [], [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag == "img":
            self.images.append(found)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        self.words.append(data)


def test_report_is_one_self_contained_file_with_every_section(written):
    folder, paths = written
    page = Page(paths[0].read_text(encoding="utf-8"))
    assert paths[0] == folder / "report.html"
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "http" not in paths[0].read_text(encoding="utf-8").split("</style>")[0]
    assert page.headings == [
        "Results",
        "Under shift",
        "Detecting foreign inputs",
        "Is the confidence calibrated?",
        "Answering only when sure",
        "Where the uncertainty comes from",
        "How many members are enough?",
        "The members",
        "Training",
        "Data",
        "The run and its cost",
        "Spec",
    ]
    assert all(image["alt"] for image in page.images)
    assert len(page.images) == len(paths) - 1


def test_plots_are_written_beside_it(written):
    folder, paths = written
    names = {path.name for path in paths[1:]}
    assert {
        "reliability-test.png",
        "reliability-shifted.png",
        "risk-coverage-test.png",
        "members-test.png",
        "uncertainty.png",
        "disagreement-test.png",
        "detection-foreign-mutual-information.png",
        "training-loss.png",
        "training-validation-nll.png",
    } <= names
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.parent == folder / "plots" for path in paths[1:])
    assert sum(path.stat().st_size for path in paths) < 5_000_000


def test_the_numbers_of_the_page_are_those_of_the_summary(written, metrics):
    text = " ".join(Page(written[1][0].read_text(encoding="utf-8")).words)
    test = metrics["ensemble"]["eval"]["test"]
    for metric in ("accuracy", "nll", "brier", "ece"):
        assert number(test[metric], metric) in text
    assert "7 min 31 s" in text and "28,763,648" in text and "15,234.5 / s" in text
    assert "Ensemble of 5" in text and "MC dropout (3 passes)" in text


def test_everything_given_by_a_user_is_escaped(metrics, tmp_path):
    evil = "<script>alert(1)</script>"
    run = metrics["run"] | {"name": evil, "base": evil}
    changed = metrics | {"run": run, "spec_yaml": evil, "versions": {evil: evil}, "data": [{"name": evil, "rows": 1}]}
    html = write_report(changed, tmp_path)[0].read_text(encoding="utf-8")
    assert "<script" not in html and html.count("&lt;script&gt;") >= 5


def test_set_names_cannot_leave_the_folder(metrics, tmp_path):
    changed = metrics | {"plots": {"risk_coverage": {"../../evil": metrics["plots"]["risk_coverage"]["test"]}}}
    paths = write_report(changed, tmp_path / "run")
    assert all((tmp_path / "run").resolve() in path.resolve().parents for path in paths)


@pytest.mark.parametrize(
    "missing",
    sweep([
        "run",
        "plots",
        "m_curve",
        "training",
        "baselines",
        "mean_member",
        "gains",
        "sets",
        "pairwise_kl",
        "memory",
        "members",
        "spec_yaml",
        "ensemble",
        "data",
        "confidence",
    ], ["run", "plots", "gains", "ensemble", "spec_yaml"]),
)
def test_anything_may_be_missing(metrics, missing, tmp_path, monkeypatch):
    monkeypatch.setattr("raylora.report.page.png_of", lambda drawn: b"")  # figures are built, but not painted
    kept = {key: value for key, value in metrics.items() if key != missing}
    Page(write_report(kept, tmp_path)[0].read_text(encoding="utf-8"))
    assert console_table(kept).row_count >= (0 if missing == "ensemble" else 1)


def test_nothing_at_all_is_still_a_page(tmp_path):
    assert Page(write_report({}, tmp_path)[0].read_text(encoding="utf-8")).headings == []


def test_a_language_model_has_perplexity_and_no_reliability(tmp_path):
    found = summarize({"ensemble": fake_language_group(3)}, FEW) | surroundings(3)
    page = Page(write_report(found, tmp_path)[0].read_text(encoding="utf-8"))
    assert page.headings == [
        "Results",
        "Under shift",
        "How many members are enough?",
        "The members",
        "Training",
        "Data",
        "The run and its cost",
        "Spec",
    ]
    assert "Perplexity" in page.words and "Brier" not in page.words
    assert "Perplexity" in render_table(found)


def distilled(language: bool = False, alone: float | None = 0.77, measured: bool = True) -> dict:
    """Return the comparison that a distillation leaves in a run."""

    def row(label: str, nll: float, parameters: int) -> dict:
        scores = {"nll": nll, "perplexity": math.exp(nll)} if language else {"nll": nll, "accuracy": 0.8, "ece": 0.1}
        costs = {"peak_memory_bytes": parameters * 4, "latency_ms": parameters / 1e6, "rows_per_s": 100.0}
        return {
            "label": label, "eval": {"test": scores | {"intervals": {"nll": [nll - 0.02, nll + 0.02]}}}, "ood": {},
            "parameters": parameters, "trainable_parameters": 1_000_000, **(costs if measured else {}),
            "retained_score": None if language else 1.0,
        }

    rows = {"teacher": row("Teacher: ensemble of 4", 0.5, 20_000_000), "student": row("Student (kl)", 0.6, 5_000_000)}
    if alone is not None:
        rows["alone"] = row("Student without a teacher", alone, 5_000_000)
    targets = {"rows": 300, "members": [0, 1, 2, 3], "size_bytes": 130_000, "made_s": 12.0}
    if language:
        targets |= {"tokens": [32, 1.0], "positions": 1000}
    where = {"device": "cpu", "threads": 1, "rounds": 10, "batch_rows": 64}
    return {"name": "student", "taught_by": "ensemble", "targets": targets, "contenders": rows,
            "output": "tokens" if language else "classes",
            "retained_metric": None if language else "accuracy", **({"measured_on": where} if measured else {})}


@pytest.mark.slow
def test_a_distillation_says_what_the_teacher_was_worth_and_what_was_kept(metrics, tmp_path):
    paths = write_report(metrics | {"distillation": [distilled(), distilled() | {"name": "other"}]}, tmp_path)
    page = Page(paths[0].read_text(encoding="utf-8"))
    text = " ".join(page.words)
    assert "test NLL of 0.600 (0.580 to 0.620), against 0.770 (0.750 to 0.790) without a teacher" in text
    assert "the teacher improved it by 0.170 nats." in text and "the intervals overlap" not in text
    assert "It keeps 100.0 % of the teacher's accuracy (80.0 % of 80.0 %), with 25 % of the parameters, " in text
    assert "25 % of the latency and 25 % of the peak memory" in text
    assert [one for one in page.headings if "Distilled" in one] == ["Distilled: student", "Distilled: other"]
    assert {"distilled-student.png", "distilled-other.png"} <= {path.name for path in paths}
    assert any("Student without a teacher 0.770" in image["alt"] for image in page.images)


@pytest.mark.parametrize(("alone", "said"), [
    (0.61, "the teacher improved it by 0.010 nats (the intervals overlap"),
    (0.5, "the teacher made it worse by 0.100 nats."),
    (0.6002, "the teacher made almost no difference (the intervals overlap"),
    (None, "what the teacher contributed is not known"),
])
def test_a_teacher_that_brought_nothing_is_not_praised(metrics, tmp_path, monkeypatch, alone, said):
    monkeypatch.setattr("raylora.report.page.png_of", lambda drawn: b"")
    found = metrics | {"distillation": [distilled(alone=alone, measured=False)]}
    text = " ".join(Page(write_report(found, tmp_path)[0].read_text(encoding="utf-8")).words)
    assert said in text and "with 25 % of the parameters." in text and "atency" not in text


def test_a_distilled_language_model_has_perplexities_and_bytes_per_token(tmp_path):
    found = summarize({"ensemble": fake_language_group(3)}, FEW) | surroundings(3)
    found["distillation"] = [distilled(language=True)]
    text = " ".join(Page(write_report(found, tmp_path)[0].read_text(encoding="utf-8")).words)
    assert "peak memory its perplexity is 1.82, the teacher's 1.65." in text
    assert "the teacher improved it by 0.170 nats per token" in text
    assert "on 300 blocks of text; the targets take 127.0 KiB" in text
    assert "130 bytes for each of 1,000 tokens (the 32 most probable" in text and "Accuracy kept" not in text


@pytest.mark.slow
def test_one_member_makes_no_claim(tmp_path):
    found = summarize({"ensemble": fake_group(1)}, FEW)
    assert headline(found) == ["One member was trained, so there is no ensemble to compare with it."]
    write_report(found, tmp_path)


def test_headline_says_better_worse_or_neither(metrics):
    def told(low, high):
        gain = {"gain": (low + high) / 2, "interval": [low, high]}
        gains = {"test": {"over_mean_member": {"nll": gain}, "over_single": {"nll": gain}}}
        return headline(metrics | {"gains": gains})[0]

    assert "0.050 better than its average member" in told(0.02, 0.08)
    assert "0.050 worse than a single LoRA" in told(-0.08, -0.02)
    assert "not measurably different" in told(-0.01, 0.03) and "better" not in told(-0.01, 0.03).split(":")[1]


def test_a_tie_is_called_a_tie(tmp_path):
    one = fake_group(1)
    copies = [replace(part, values=part.values.expand(3, -1, -1)) for part in one]
    found = summarize({"ensemble": copies}, FEW)
    assert "the same as its average member to the digits shown" in headline(found)[0]
    rows = entries(found)
    cells = columns(rows, [("test", "nll")], lambda row, name, metric: row.cell("eval", name, metric))
    assert not any(cell.best for line in cells for cell in line)
    assert (difference(-1e-9, "nll"), difference(-1e-9, "accuracy")) == ("+0.000", "+0.0 pts")


@pytest.mark.slow
def test_a_degraded_run_is_marked(metrics, tmp_path):
    degraded = metrics | {"run": metrics["run"] | {"degraded": True, "members_done": 4}}
    assert headline(degraded)[-1].startswith("Degraded: 4 of 5 members finished")
    assert "This run is degraded" in write_report(degraded, tmp_path)[0].read_text(encoding="utf-8")


def render_table(metrics):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(console_table(metrics))
    return console.export_text()


def test_console_table_is_compact_and_agrees(metrics):
    text = render_table(metrics)
    assert "Ensemble of 5" in text and "Single LoRA (member 0)" in text and "AUROC" in text
    assert number(metrics["ensemble"]["eval"]["shifted"]["nll"]) in text
    assert re.search(r"Mean member +│ +[\d.]+ % ±[\d.]+ %", text)


def test_units_are_read_off_names():
    assert dict(
        flat(
            {
                "total_s": 451.2,
                "tokens_per_s": 12.3456,
                "base_bytes": 120_000_000,
                "cpus": 8,
                "peak_rss_bytes_per_worker": [1024, 2048],
                "gone": None,
                "gpu": {"memory_bytes": 0},
            }
        )
    ) == {
        "Total": "7 min 31 s",
        "Tokens": "12.3 / s",
        "Base": "114.4 MiB",
        "Cpus": "8",
        "Peak rss per worker": "1.0 KiB, 2.0 KiB",
        "Gpu: Memory": "0 B",
    }
    assert (duration(8000), size(3 * 2**30), number(0.8349, "accuracy")) == ("2 h 13 min", "3.00 GiB", "83.5 %")
