"""The live page's server: the page, a stream of records, and a run's finished report; it reads and never writes."""

from __future__ import annotations

import errno
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import unquote, urlsplit

from raylora.errors import RayloraError, UsageError
from raylora.web.access import TOKEN, Access, without_token
from raylora.web.runs import Runs

PORT = 8266
_MOST_STREAMS = 64
_STILL_THERE_S = 15.0
_PAGE_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_REPORT_CSP = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; sandbox allow-popups"
)
"""The report is one file with styles inside; it needs no script and gets none."""
_ASSETS = {"page.js": "text/javascript", "page.css": "text/css"}
_RUN = re.compile(r"/runs/([^/]+)/(.*)")
_PLOT = re.compile(r"plots/[a-z0-9_-]+\.png")


class PageServer(ThreadingHTTPServer):
    """Serves the page of the runs below one path until it is closed."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, runs: Runs, host: str = "127.0.0.1", port: int = PORT) -> None:
        """Bind to an address; port 0 is any that is free.

        Raises:
            UsageError: the address cannot be used.
        """
        self.runs, self.access = runs, Access(host)
        self.streams = threading.BoundedSemaphore(_MOST_STREAMS)
        self.closing = threading.Event()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            raise UsageError(
                f"--web: cannot listen on {host} port {port}: {error}",
                "choose another with --port, or --port 0 for any that is free" if in_use else
                "choose an address of this machine with --host, and a port that you may use with --port",
            ) from None

    @property
    def url(self) -> str:
        """What to open; it holds the token, if one is needed."""
        host, port = self.server_address[:2]
        name = str(host)
        if name in ("0.0.0.0", "::"):
            name = socket.gethostname()
        name = f"[{name}]" if ":" in name else name
        return f"http://{name}:{port}/" + (f"?{TOKEN}={self.access.token}" if self.access.token else "")

    def server_close(self) -> None:
        """Stop listening and let the streams end."""
        self.closing.set()
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of browsers that went away; what a request does wrong is answered to it."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version, sys_version = "raylora", ""
    timeout = 60.0
    """Of every single read and write: who is silent for longer is let go."""

    def do_GET(self) -> None:
        """Answer a request, if its sender may look."""
        port = self.server.server_address[1]
        if not self.server.access.allows(self.path, dict(self.headers.items()), port):
            why = "this page needs the token that `raylora status --web` printed: open the whole address\n"
            self._text(HTTPStatus.UNAUTHORIZED if self.server.access.token else HTTPStatus.FORBIDDEN, why)
            return
        clean = without_token(self.path)
        if clean is not None:  # the token goes into a cookie, out of the address that people copy
            self._redirect(clean, self.server.access.cookie(port) if self.server.access.token else "")
            return
        try:
            self._route(unquote(urlsplit(self.path).path))
        except (FileNotFoundError, KeyError):
            self._text(HTTPStatus.NOT_FOUND, "there is nothing here\n")
        except RayloraError as error:
            self._text(HTTPStatus.BAD_GATEWAY, f"{error}\n")

    do_HEAD = do_GET

    def _refuse(self) -> None:
        """Refuse what would change something: there is nothing to change here."""
        self._text(HTTPStatus.METHOD_NOT_ALLOWED, "this page is read-only\n", {"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    def _route(self, path: str) -> None:
        runs = self.server.runs
        if path == "/":
            if runs.is_one:
                self._redirect(f"/runs/{runs.only}/")
            else:
                self._page()
        elif path == "/events":
            self._stream(lambda: {"runs": runs.listing()})
        elif path.removeprefix("/assets/") in _ASSETS and path.startswith("/assets/"):
            name = path.removeprefix("/assets/")
            self._send(HTTPStatus.OK, _asset(name), f"{_ASSETS[name]}; charset=utf-8")
        elif (found := _RUN.fullmatch(path)) is not None:
            self._of_run(found[1], found[2])
        else:
            raise KeyError(path)

    def _of_run(self, key: str, rest: str) -> None:
        reader = self.server.runs.reader(key)
        if rest == "":
            self._page()
        elif rest == "events":
            self._stream(reader.read)
        elif rest == "report.html":
            self._send(HTTPStatus.OK, reader.store.storage.read(rest), "text/html; charset=utf-8",
                       {"Content-Security-Policy": _REPORT_CSP})
        elif _PLOT.fullmatch(rest):
            self._send(HTTPStatus.OK, reader.store.storage.read(rest), "image/png")
        else:
            raise KeyError(rest)

    # --- answers ------------------------------------------------------------------------------------
    def _page(self) -> None:
        self._send(HTTPStatus.OK, _asset("page.html"), "text/html; charset=utf-8")

    def _stream(self, read: Callable[[], dict[str, Any]]) -> None:
        """Send a record whenever it has changed, and a sign of life where nothing changes."""
        if not self.server.streams.acquire(blocking=False):
            self._text(HTTPStatus.SERVICE_UNAVAILABLE, "too many people look on\n")
            return
        try:
            self._head(HTTPStatus.OK, "text/event-stream; charset=utf-8", {"X-Accel-Buffering": "no"})
            said, said_at = b"", 0.0
            while self.command != "HEAD" and not self.server.closing.is_set():
                record = json.dumps(read(), allow_nan=False).encode()  # one line: JSON escapes every line end
                if record != said:
                    self.wfile.write(b"data: " + record + b"\n\n")
                    said, said_at = record, time.monotonic()
                elif time.monotonic() - said_at > _STILL_THERE_S:
                    self.wfile.write(b": still there\n\n")
                    said_at = time.monotonic()
                self.wfile.flush()
                self.server.closing.wait(self.server.runs.every_s)
        finally:
            self.server.streams.release()

    def _text(self, status: HTTPStatus, text: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, text.encode(), "text/plain; charset=utf-8", headers)

    def _redirect(self, to: str, cookie: str = "") -> None:
        self._send(HTTPStatus.SEE_OTHER, b"", "text/plain; charset=utf-8",
                   {"Location": to, **({"Set-Cookie": cookie} if cookie else {})})

    def _send(
        self, status: HTTPStatus, content: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        self._head(status, kind, {"Content-Length": str(len(content)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, status: HTTPStatus, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Security-Policy": _PAGE_CSP,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log no requests: their addresses may hold the token."""


def _asset(name: str) -> bytes:
    return (files("raylora") / "web" / name).read_bytes()
