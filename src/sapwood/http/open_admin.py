"""Keeps the routes that steer a server closed where other machines reach it and no key is set."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from sapwood.http.endpoints import EndpointTable
from sapwood.http.errors import NotAllowed, error_response


class NoOpenAdmin:
    """ASGI middleware that answers 403 on the endpoints for admins; all else passes untouched."""

    def __init__(self, app: ASGIApp, *, endpoints: EndpointTable) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._is_for_admins(scope):
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        refusal = NotAllowed(
            f"{path} steers this server, which other machines can reach and which has no key; "
            "start it with --admin-api-key KEY and send that, or with --allow-open-admin where "
            "everybody who reaches it may do this"
        )
        await error_response(refusal, self._endpoints.error_form(path).body)(scope, receive, send)

    def _is_for_admins(self, scope: Scope) -> bool:
        endpoint = self._endpoints.find(scope["method"], scope["path"])
        return endpoint is not None and endpoint.access == "admin"
