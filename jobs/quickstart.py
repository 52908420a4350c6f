"""The quickstart as a job: ``ray job submit --working-dir . -- python jobs/quickstart.py``.

Arguments are those of ``raylora run``: another spec, ``--set key=value``. Submitted again, it continues.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the uploaded folder, where raylora is not installed

from raylora.cli import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        arguments = ["examples/quickstart.yaml", *arguments]
    main(["run", *arguments])
