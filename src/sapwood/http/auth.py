"""Keys: who may use the server, and who may steer it."""

from __future__ import annotations

import hmac
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sapwood.http.endpoints import EndpointTable
from sapwood.http.errors import NotAllowed, NotAuthenticated, error_response


class KeysOnly:
    """ASGI middleware that answers 401 or 403 to a request with no key or with the wrong key.

    A key is `Authorization: Bearer KEY`, as OpenAI's clients send it, or `x-api-key: KEY`, as
    Anthropic's do. All else passes untouched. With an admin key and no API key, only the admin
    endpoints need a key. A path without an endpoint needs the key that users need.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        endpoints: EndpointTable,
        api_key: str | None,
        admin_api_key: str | None,
    ) -> None:
        self._app = app
        self._endpoints = endpoints
        self._api_key = None if api_key is None else _digest(api_key)
        self._admin_key = None if admin_api_key is None else _digest(admin_api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        response = error_response(refusal, self._endpoints.error_form(scope["path"]).body)
        if refusal.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _refusal(self, scope: Scope) -> NotAuthenticated | NotAllowed | None:
        path = scope["path"]
        endpoint = self._endpoints.find(scope["method"], path)
        access = "user" if endpoint is None else endpoint.access
        if scope["method"] == "OPTIONS" or access == "open":
            return None
        needs_admin = access == "admin" and self._admin_key is not None
        if not needs_admin and self._api_key is None:
            return None
        given = _given_key(Headers(scope=scope))
        # Both keys are compared in any case, as digests of equal length: the time reveals nothing.
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
