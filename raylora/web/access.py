"""Who may look: anybody on this machine at a loopback address, elsewhere whoever has the token."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlencode, urlsplit

TOKEN = "token"


class Access:
    """Decides about requests. There is a token if the page is bound to anything but a loopback address."""

    def __init__(self, host: str) -> None:
        """Make a token if one is needed; it lives as long as the server."""
        self.is_loopback = is_loopback(host)
        self.token = "" if self.is_loopback else secrets.token_urlsafe(24)

    def allows(self, target: str, headers: Mapping[str, str], port: int) -> bool:
        """Return whether a request may be answered.

        Without a token the request has to name a loopback host: else a page of another site, whose name was made to
        lead here, could read what is shown.
        """
        if not self.token:
            return is_loopback(_host_of(headers.get("Host", "")))
        cookie = _cookie(headers.get("Cookie", ""), cookie_name(port))
        given = [cookie, *parse_qs(urlsplit(target).query).get(TOKEN, [])]
        # Every one is compared, and each in constant time: how long it takes says nothing about the token.
        return any([hmac.compare_digest(one.encode(), self.token.encode()) for one in given])

    def cookie(self, port: int) -> str:
        """Return the header that has a browser remember the token, for this server and nobody else's pages."""
        return f"{cookie_name(port)}={self.token}; Path=/; HttpOnly; SameSite=Strict"


def cookie_name(port: int) -> str:
    """Return a name of its own for each server on a host: browsers share cookies between ports."""
    return f"raylora_{port}"


def without_token(target: str) -> str | None:
    """Return a target without the token that it gives, or None if it gives none."""
    parts = urlsplit(target)
    query = parse_qs(parts.query, keep_blank_values=True)
    if query.pop(TOKEN, None) is None:
        return None
    rest = urlencode(query, doseq=True)
    path = "/" + parts.path.lstrip("/")  # never //host, which leads elsewhere
    return f"{path}?{rest}" if rest else path


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine and nobody else can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _host_of(header: str) -> str:
    return header.rpartition(":")[0] if not header.endswith("]") and ":" in header else header


def _cookie(header: str, name: str) -> str:
    try:
        found = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return found.value if found is not None else ""
