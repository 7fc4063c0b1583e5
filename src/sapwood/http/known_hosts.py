"""Keeps DNS rebinding out: the Host header of a request must name this server.

The owner of a web page may let the page's own name point to the address of a visitor's machine, or
of another machine in the visitor's network. To the browser, a server at that address then belongs
to the page's own origin: the page may send it anything and read every answer. Only the Host header
shows the attack, since it has the page's name.

IP addresses in the Host header pass, since nobody can point an address elsewhere, and so do names
that the public DNS never answers. A server that only its own machine can reach demands a known name
from every client. A server that other machines can reach demands it only from browsers: the names
by which programs reach it (a container's, a cluster service's, a proxy's) cannot be guessed.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from ipaddress import ip_address

from starlette.types import ASGIApp, Receive, Scope, Send

from sapwood.http.endpoints import EndpointTable
from sapwood.http.errors import OtherOrigin, error_response
from sapwood.http.origin import PAGE_HEADERS
from sapwood.http.raw_headers import find, has_any

_PRIVATE_DOMAINS = (".localhost", ".local", ".internal", ".home.arpa")
"""RFC 6761, RFC 6762, ICANN's resolution of 2024 and RFC 8375."""
_ADDRESS = re.compile(r"\[[0-9a-f:.%]+\]|(.*\.)?[0-9]+")
"""IPv6 in brackets; and names that end in a number, as IPv4 addresses do and no domain does."""
_PORT = re.compile(r":[0-9]*$")


def is_loopback(host: str) -> bool:
    """Whether only its own machine can reach a server that listens on that address or name."""
    if _is_within(host.lower(), "localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def is_known(host: str, allowed: Collection[str] = ()) -> bool:
    """Whether a Host header names this server.

    allowed  further names; "*.example.com": all below it; "*": any
    """
    name = _PORT.sub("", host.strip().lower()).rstrip(".")
    if "*" in allowed or "." not in name or _ADDRESS.fullmatch(name):
        return True
    if name.endswith(_PRIVATE_DOMAINS):
        return True
    return any(
        name.endswith(pattern[1:].lower()) if pattern.startswith("*.") else name == pattern.lower()
        for pattern in allowed
    )


class KnownHostsOnly:
    """ASGI middleware that answers 403 to requests for other names; all else passes untouched.

    allowed   as in `is_known`
    is_local  whether only this machine can reach the server: then programs, too, must use a known
              name
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        endpoints: EndpointTable,
        allowed: Collection[str],
        is_local: bool,
    ) -> None:
        self._app = app
        self._endpoints = endpoints
        self._allowed = frozenset(allowed)
        self._is_local = is_local
        self._last_known = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = find(scope["headers"], b"host", b"").decode("latin-1")
            is_asked = self._is_local or has_any(scope["headers"], PAGE_HEADERS)
            if is_asked and host != self._last_known and not is_known(host, self._allowed):
                refusal = OtherOrigin(
                    f"the request is for the host {host[:200]!r}, which is not known to be this "
                    "server's: a web page may have given its own name to this address. Use the "
                    "server's address or localhost, or start the server with --allowed-hosts and "
                    "that name, or with --api-key"
                )
                response = error_response(refusal, self._endpoints.error_form(scope["path"]).body)
                await response(scope, receive, send)
                return
            if is_asked:
                self._last_known = host
        await self._app(scope, receive, send)


def _is_within(name: str, domain: str) -> bool:
    return name == domain or name.endswith("." + domain)
