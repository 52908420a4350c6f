"""The page's words: dates, units and names that a person reads, and no field's name among them."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from ensemble_fakes import fake_group, fake_language_group
from test_regression_ensemble import group_of
from test_report import distilled, surroundings

from raylora import registry
from raylora.adapters.names import NAMES, adapter_name
from raylora.adapters.peft import OPTIONS
from raylora.ensemble import summarize
from raylora.ensemble.outputs.base import Names
from raylora.ensemble.summary import find_errors
from raylora.report import console_table, figures_training, write_report
from raylora.report.facts import LABELS, facts, run_facts
from raylora.report.formatting import duration, flat, moment
from raylora.report.headline import headline
from raylora.report.rendering import quoted
from raylora.spec import EvaluationSpec
from raylora.store.run_store import RunStore

FEW = EvaluationSpec(bootstrap_samples=5)
KEY = re.compile(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b")


class Visible(HTMLParser):
    """Collect what a reader sees, but for what is quoted from the spec or the command line."""

    HIDDEN = frozenset({"style", "pre", "code"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.words += [value or "" for key, value in attrs if key == "alt"]
        if tag in self.HIDDEN:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.HIDDEN:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open:
            self.words.append(data)


def keys_in(metrics: Any, folder: Any) -> set[str]:
    """Return what on a page looks like a field's name."""
    html = write_report(metrics, folder)[0].read_text(encoding="utf-8")
    return {key for words in Visible(html).words for key in KEY.findall(words)}


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raylora.report.page.png_of", lambda drawn: b"")  # figures are built, but not painted


@pytest.mark.parametrize("output", ["classes", "value", "tokens"])
def test_no_field_name_is_seen_on_a_page(output: str, unpainted: None, tmp_path: Any) -> None:
    groups: dict[str, Any] = {
        "classes": {"ensemble": fake_group(3), "mc_dropout": fake_group(2, seed=5), "last_layer": fake_group(2, 6)},
        "value": {"ensemble": group_of(3)}, "tokens": {"ensemble": fake_language_group(3)},
    }[output]
    language = output == "tokens"
    metrics: Any = {**summarize(groups, FEW), **surroundings(3), "distillation": [distilled(language)]}
    metrics["errors"] = find_errors(groups["ensemble"], FEW, Names())
    metrics["distillation"][0]["contenders"]["student"]["label"] = "Student (topk_kl)"
    metrics["run"]["task"] = "language_modeling"
    metrics["data"] += [{"name": "letters", "role": "out_of_distribution", "rows": 3}]
    for rows in metrics["training"].values():  # falling to the end, so that advice is given
        rows += [{"step": s, "validation_nll": v} for s, v in ((1, 1.0), (2, 0.5), (300, 0.9), (400, 1.9))]
    assert keys_in(metrics, tmp_path) == set()


def test_a_real_run_is_told_in_words(
    unpainted: None, trained: Callable[[Any], str], make_spec: Callable[..., Any], tmp_path: Any
) -> None:
    metrics = RunStore(trained(make_spec())).read_json("metrics.json")
    assert keys_in(metrics, tmp_path) <= {metrics["machine"]["architecture"]}
    run, told = dict(run_facts(metrics)), facts(metrics)
    assert re.fullmatch(r"\d{1,2} [A-Z][a-z]+ 20\d\d, \d\d:\d\d UTC", run["Started"]) and run["Adapter"] == "LoRA"
    memory = dict(told["Memory"])
    assert memory["Peak memory per worker"].endswith("iB") and "Peak GPU memory per worker" not in memory
    assert dict(told["Time"])["Training of one job, on average"].endswith(" s")
    assert dict(told["Machine"])["Multiplies bfloat16 natively"] in ("yes", "no")


def test_dates_and_durations_are_written_out() -> None:
    assert moment(1795516335.25) == "24 November 2026, 10:32 UTC"
    assert moment("2025-03-01T12:00:00+02:00") == moment("2025-03-01T10:00:00Z") == "1 March 2025, 10:00 UTC"
    assert moment("yesterday") == "yesterday"
    assert (duration(186.2), duration(89.6), duration(3 * 3600 + 360)) == ("3 min 6 s", "89.6 s", "3 h 6 min")
    assert flat({"peak_rss_bytes_per_worker": [1024], "new_field_s": 2.0}, labels=LABELS) == [
        ("Peak memory per worker", "1.0 KiB"), ("New field", "2.0 s")
    ]


def test_settings_and_commands_are_code_and_the_rest_is_escaped() -> None:
    text = str(quoted("<b> raise optimization.epochs, or `raylora run --x`. End <"))
    assert "<code>optimization.epochs</code>, or <code>raylora run --x</code>. End &lt;" in text
    assert text.startswith("&lt;b&gt;")


# --- adapters ---------------------------------------------------------------------------------------------
def spec_of(**content: Any) -> Any:
    """Return an adapter's spec."""
    return registry.load("adapter", content["kind"]).Spec(**content)


def test_every_adapter_and_every_peft_method_has_a_name() -> None:
    kinds = [kind for kind in registry.kinds("adapter") if kind != "peft"]
    methods = [spec_of(kind="peft", method=method) for method in OPTIONS]
    for spec in [*(spec_of(kind=kind) for kind in kinds), *methods]:
        assert spec.variant in NAMES


@pytest.mark.parametrize(("content", "name"), [
    ({"kind": "lora"}, "LoRA"), ({"kind": "mos"}, "MoS"), ({"kind": "full"}, "full fine-tuning"),
    ({"kind": "peft", "method": "LORA", "options": {"use_dora": True}}, "DoRA"),
    ({"kind": "peft", "method": "LORA", "options": {"init_lora_weights": "pissa"}}, "PiSSA"),
    ({"kind": "peft", "method": "LORA", "options": {"use_rslora": True}}, "rsLoRA"),
    ({"kind": "peft", "method": "IA3"}, "IA³"), ({"kind": "peft", "method": "VERA"}, "VeRA"),
])
def test_adapters_are_called_what_people_call_them(content: dict[str, Any], name: str) -> None:
    assert adapter_name(spec_of(**content)).name == name


@pytest.mark.parametrize(("adapter", "lead", "single"), [
    ("LoRA", "A LoRA ensemble: several low-rank adapters trained separately on one frozen base", "Single LoRA ("),
    ("IA³", "An IA³ ensemble: several adapters trained separately on one frozen base", "Single IA³ ("),
    ("full fine-tuning", "A full fine-tuning ensemble: several whole models trained separately from one base",
     "Single fully fine-tuned model ("),
    ("mine", "A mine ensemble: several adapters", "Single mine ("),
])
def test_a_page_speaks_of_the_adapter_that_was_trained(
    adapter: str, lead: str, single: str, unpainted: None, tmp_path: Any
) -> None:
    metrics: Any = {**summarize({"ensemble": fake_group(2)}, FEW), **surroundings(2)}
    metrics["run"]["adapter"] = adapter
    html = write_report(metrics, tmp_path)[0].read_text(encoding="utf-8")
    assert lead in html and f": {adapter} ensemble report</title>" in html and single in html
    assert ("LoRA" in html) is (adapter == "LoRA") and single.lower().removesuffix(" (") in headline(metrics)[0].lower()
    assert console_table(metrics).row_count == 3


# --- training ---------------------------------------------------------------------------------------------
def test_every_validation_metric_of_the_history_is_drawn_and_stops_are_marked(unpainted: None, tmp_path: Any) -> None:
    metrics: Any = {**summarize({"ensemble": fake_group(3)}, FEW), **surroundings(3)}
    for rows in metrics["training"].values():
        rows += [{"step": step, "validation_accuracy": 0.5, "validation_ece": 0.1} for step in (50, 100)]
    for index, one in enumerate(metrics["members"]):
        one |= {"name": f"member-{index:03d}", "stopped_at": 100 if index else None}
    drawn = {one.name: one for one in figures_training.training(metrics)}
    assert list(drawn) == ["training-loss", "training-validation-nll", "training-validation-accuracy",
                           "training-validation-ece", "training-grad-norm", "training-lr"]
    (axes,) = drawn["training-validation-accuracy"].figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert {"0", "1", "2"} <= lines.keys() and list(lines["1"].get_ydata()) == [50, 50]
    assert [tuple(line.get_xdata()) for line in axes.lines if line.get_marker() == "X"] == [(100,), (100,)]
    assert "2 of 3 stopped early" in drawn["training-loss"].alt
    assert "A cross is where" in write_report(metrics, tmp_path)[0].read_text(encoding="utf-8")


def test_a_run_records_who_stopped_when(trained: Callable[[Any], str], make_spec: Callable[..., Any]) -> None:
    spec = make_spec(
        optimization={"lr": 0.05, "epochs": 6, "micro_batch": 8}, ensemble__regularizers={"early_stopping": {}}
    )
    metrics = RunStore(trained(spec)).read_json("metrics.json")
    steps = [one["stopped_at"] for one in metrics["members"]]
    for step, rows in zip(steps, metrics["training"].values(), strict=True):
        assert step is None or step == max(row["step"] for row in rows)
    assert any(steps) and {"validation_nll", "validation_accuracy"} <= metrics["training"]["member-000"][-1].keys()
