"""``raylora status RUN --web``: the live page, served until somebody interrupts it."""

from __future__ import annotations

import json
import signal
import threading
from typing import Any

from raylora.display.console import err


def serve_page(path: str, host: str, port: int, as_json: bool) -> None:
    """Serve the page of a run, or of the runs in a folder, until SIGINT or SIGTERM.

    Raises:
        RunDirectoryError: there is no run.
        UsageError: the address cannot be used.
    """
    from raylora.web.runs import Runs
    from raylora.web.server import PageServer

    server = PageServer(Runs(path), host, port)

    def end(number: int, frame: Any) -> None:
        # Not in this thread, which is the one that shutdown waits for.
        threading.Thread(target=server.shutdown, daemon=True).start()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # Not by rich, which would break a long line.
        print(json.dumps({"url": server.url}) if as_json else server.url, flush=True)
        if server.access.token:
            err.print("the address holds a token: whoever has it can look on; the connection is not encrypted")
        err.print("read-only; Ctrl+C ends it")
        server.serve_forever(poll_interval=0.2)
    finally:
        server.server_close()
        for number, handler in before.items():
            signal.signal(number, handler)
