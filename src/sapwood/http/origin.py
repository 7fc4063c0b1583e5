"""Keeps web pages of other origins from using the server through a visitor's browser.

A browser lets any page POST to any address, localhost included, as long as the content type is one
of a form's; and bodies count as JSON here whatever their content type says. So requests that change
something or cost computation are refused if a browser says that they come from elsewhere. Programs
send none of these headers, and are not affected.

Source: the rule of Go's net/http.CrossOriginProtection, which stands on Sec-Fetch-Site (sent by all
browsers since 2023 to https and to localhost) and falls back to comparing Origin with Host.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sapwood.http.endpoints import SAFE_METHODS, EndpointTable
from sapwood.http.errors import OtherOrigin, error_response
from sapwood.http.raw_headers import has_any

PAGE_HEADERS = frozenset({b"origin", b"sec-fetch-site"})
"""Programs send none of them; browsers send Origin, except with a plain GET."""
_TRUSTED_SITES = frozenset({"same-origin", "none"})


def why_refused(headers: Mapping[str, str], allowed: Collection[str] = ()) -> str | None:
    """Where a request comes from if that is another origin; None if it may pass.

    allowed  origins that may; "*": all
    A proxy may rewrite Host, so the browser's own word counts before the comparison.
    """
    site = headers.get("sec-fetch-site")
    origin = headers.get("origin")
    if "*" in allowed or (origin is not None and origin in allowed):
        return None
    if site is not None:
        if site in _TRUSTED_SITES:
            return None
        return f"{origin or 'another site'} (Sec-Fetch-Site: {site})"
    if origin is None or urlsplit(origin).netloc == headers.get("host"):
        return None
    return origin


class SameOriginOnly:
    """ASGI middleware that answers 403 to what `why_refused` names; all else passes untouched."""

    def __init__(
        self, app: ASGIApp, *, endpoints: EndpointTable, allowed: Collection[str] = ()
    ) -> None:
        self._app = app
        self._endpoints = endpoints
        self._allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_from_page = scope["type"] == "http" and has_any(scope["headers"], PAGE_HEADERS)
        if is_from_page and self._has_effect(scope):
            where = why_refused(Headers(scope=scope), self._allowed)
            if where is not None:
                refusal = OtherOrigin(
                    f"the request comes from a web page of {where}, which may not use this "
                    "server; use the page that this server serves, or a program, or start the "
                    "server with --cors-allow-origins"
                )
                form = self._endpoints.error_form(scope["path"])
                response = error_response(refusal, form.body)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _has_effect(self, scope: Scope) -> bool:
        method = scope["method"]
        endpoint = self._endpoints.find(method, scope["path"])
        return method not in SAFE_METHODS if endpoint is None else endpoint.has_effect(method)
