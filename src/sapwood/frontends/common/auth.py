"""Keys: who may use the server, and who may steer it."""

from __future__ import annotations

import hmac
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sapwood.frontends.common.errors import (
    NotAllowed,
    NotAuthenticated,
    body_for_path,
    error_response,
)

OPEN_PATHS = frozenset({"/health", "/health_generate", "/metrics", "/ping"})
"""Probes and scrapers bring no keys."""

PAGE_PATHS = frozenset(
    {
        "/",
        "/favicon.svg",
        "/web/chat.css",
        "/web/chat.js",
        "/web/markdown.js",
        "/dashboard",
        "/web/dashboard.css",
        "/web/dashboard.js",
    }
)
"""The chat page and the live page themselves, which hold nothing secret and ask for the key."""

ADMIN_PATHS = frozenset(
    {
        "/flush_cache",
        "/abort_request",
        "/start_profile",
        "/stop_profile",
        "/freeze_gc",
        "/slow_down",
        "/configure_logging",
    }
)
"""Routes that steer the server, or concern the requests of others."""


class KeysOnly:
    """ASGI middleware that answers 401 or 403 to who brings no key or the wrong one.

    A key is `Authorization: Bearer KEY`, as OpenAI's clients send it, or `x-api-key: KEY`, as
    Anthropic's do. All else passes untouched. With an admin key and no API key, only the admin
    routes need one.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, admin_api_key: str | None) -> None:
        self._app = app
        self._api_key = None if api_key is None else _digest(api_key)
        self._admin_key = None if admin_api_key is None else _digest(admin_api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        response = error_response(refusal, body_for_path(scope["path"]))
        if refusal.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _refusal(self, scope: Scope) -> NotAuthenticated | NotAllowed | None:
        path = scope["path"]
        if scope["method"] == "OPTIONS" or path in OPEN_PATHS or path in PAGE_PATHS:
            return None
        needs_admin = path in ADMIN_PATHS and self._admin_key is not None
        if not needs_admin and self._api_key is None:
            return None
        given = _given_key(Headers(scope=scope))
        # Both are compared in any case, and digests are of one length: time tells nothing.
        digest = _digest(given)
        is_user = self._api_key is not None and hmac.compare_digest(digest, self._api_key)
        is_admin = self._admin_key is not None and hmac.compare_digest(digest, self._admin_key)
        if is_admin or (is_user and not needs_admin):
            return None
        if is_user:
            return NotAllowed(f"{path} needs the admin key of this server, and this is its API key")
        name = "the admin key" if needs_admin else "an API key"
        problem = "this is not it" if given else "none was sent"
        return NotAuthenticated(
            f"{path} needs {name} of this server and {problem}; send it as "
            "`Authorization: Bearer KEY` or `x-api-key: KEY`"
        )


def _given_key(headers: Headers) -> str:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return headers.get("x-api-key", "").strip()


def _digest(key: str) -> bytes:
    return sha256(key.encode("latin-1", "replace")).digest()
