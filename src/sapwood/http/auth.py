"""Keys: who may use the server, and who may steer it."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sapwood.base.errors import SapwoodError
from sapwood.http.callers import Caller, Callers, Role, digest_of
from sapwood.http.endpoints import AccessLevel, EndpointTable
from sapwood.http.errors import NotAllowed, NotAuthenticated, error_response

CALLER = "sapwood.caller"
"""Where a request's scope has the caller whose key opened the endpoint."""


class ServerKeys:
    """The server's own keys.

    has_callers  whether there are callers with keys and roles of their own
    """

    def __init__(
        self, *, api_key: str | None, admin_api_key: str | None, has_callers: bool = False
    ) -> None:
        self._api_key = None if api_key is None else digest_of(api_key)
        self._admin_key = None if admin_api_key is None else digest_of(admin_api_key)
        self._has_callers = has_callers
        self.api_role = Role.USER if self._admin_key is not None or has_callers else Role.ADMIN

    def is_needed(self, access: AccessLevel) -> bool:
        """Whether calls with this access need a key at all."""
        if access == "open":
            return False
        users_need_keys = self._api_key is not None or self._has_callers
        return users_need_keys or (access == "admin" and self._admin_key is not None)

    def find(self, given: str) -> Caller | None:
        """Whose key it is; None: it is none of the server's own."""
        # Both keys are compared in any case, as digests of equal length: the time reveals nothing.
        digest = digest_of(given)
        is_user = self._api_key is not None and hmac.compare_digest(digest, self._api_key)
        is_admin = self._admin_key is not None and hmac.compare_digest(digest, self._admin_key)
        if is_admin:
            return Caller("the admin key", Role.ADMIN)
        return Caller("the API key", self.api_role) if is_user else None


class KeysOnly:
    """ASGI middleware that answers 401 or 403 to a request with no key or with the wrong key.

    A key is `Authorization: Bearer KEY`, as OpenAI's clients send it, or `x-api-key: KEY`, as
    Anthropic's do. All else passes untouched. With an admin key and no other, only the admin
    endpoints need a key. Where callers have roles, the API key is one of a user. A path without an
    endpoint needs the key that users need.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        endpoints: EndpointTable,
        api_key: str | None,
        admin_api_key: str | None,
        callers: Sequence[Callers] = (),
    ) -> None:
        self._app = app
        self._endpoints = endpoints
        self._callers = tuple(callers)
        self._keys = ServerKeys(
            api_key=api_key, admin_api_key=admin_api_key, has_callers=bool(self._callers)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = await self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        response = error_response(refusal, self._endpoints.error_form(scope["path"]).body)
        if refusal.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    async def _refusal(self, scope: Scope) -> SapwoodError | None:
        path = scope["path"]
        endpoint = self._endpoints.find(scope["method"], path)
        access = "user" if endpoint is None else endpoint.access
        if scope["method"] == "OPTIONS" or not self._keys.is_needed(access):
            return None
        given = given_key(Headers(scope=scope))
        try:
            caller = await self._caller(given)
        except SapwoodError as error:
            return error
        needs_admin = access == "admin" and self._keys.api_role is not Role.ADMIN
        if caller is None:
            return self._not_authenticated(path, needs_admin, given)
        scope[CALLER] = caller
        if not needs_admin or caller.role is Role.ADMIN:
            return None
        if self._callers:
            return NotAllowed(f"{path} needs the role admin, and {caller.name} has the role user")
        return NotAllowed(f"{path} needs the admin key of this server, and this is its API key")

    async def _caller(self, given: str) -> Caller | None:
        own = self._keys.find(given)
        if own is not None:
            return own
        if given:
            for callers in self._callers:
                caller = await callers.find(given)
                if caller is not None:
                    return caller
        return None

    def _not_authenticated(self, path: str, needs_admin: bool, given: str) -> NotAuthenticated:
        problem = "this is not it" if given else "none was sent"
        name = "an API key"
        if needs_admin:
            name = "a key with the role admin" if self._callers else "the admin key"
        return NotAuthenticated(
            f"{path} needs {name} of this server and {problem}; send it as "
            "`Authorization: Bearer KEY` or `x-api-key: KEY`"
        )


def given_key(headers: Mapping[str, str]) -> str:
    """The key in these headers, whose names are in lower case; "": none."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return headers.get("x-api-key", "").strip()
