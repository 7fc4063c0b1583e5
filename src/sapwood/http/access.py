"""Who may use the server: keys and origins."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from sapwood.http.auth import KeysOnly
from sapwood.http.callers import Callers
from sapwood.http.endpoints import EndpointTable
from sapwood.http.known_hosts import KnownHostsOnly
from sapwood.http.open_admin import NoOpenAdmin
from sapwood.http.origin import SameOriginOnly

CORS_MAX_AGE_S = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may use the server.

    api_key          opens all endpoints, except those for admins if there is an admin key; None:
                     users need no key
    admin_api_key    opens all endpoints; None: the API key opens those for admins too, if there are
                     no `callers`
    callers          know callers with keys and roles of their own
    allowed_origins  origins of web pages that may use the server besides its own; "*": all
    allowed_hosts    names of the server, besides its addresses and those of private networks;
                     "*": any
    is_local         whether only the server's own machine can reach it
    refuses_open_admin  whether the endpoints for admins are refused where no key opens them
    """

    api_key: str | None = field(default=None, repr=False)
    admin_api_key: str | None = field(default=None, repr=False)
    callers: tuple[Callers, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    is_local: bool = False
    refuses_open_admin: bool = False

    @property
    def asks_for_keys(self) -> bool:
        """Whether any endpoint needs a key."""
        return self.api_key is not None or self.admin_api_key is not None or bool(self.callers)


class Guarded:
    """ASGI middleware: an application behind its checks, in their order.

    The checks pass on a request's messages unwrapped: otherwise a client's disconnect would be
    hidden, and its request would go on.
    """

    def __init__(self, app: ASGIApp, *, access: Access, endpoints: EndpointTable) -> None:
        guarded = app
        if access.asks_for_keys:
            guarded = KeysOnly(
                guarded,
                endpoints=endpoints,
                api_key=access.api_key,
                admin_api_key=access.admin_api_key,
                callers=access.callers,
            )
        elif access.refuses_open_admin:
            guarded = NoOpenAdmin(guarded, endpoints=endpoints)
        guarded = SameOriginOnly(guarded, endpoints=endpoints, allowed=access.allowed_origins)
        guarded = KnownHostsOnly(
            guarded,
            endpoints=endpoints,
            allowed=access.allowed_hosts,
            is_local=access.is_local,
        )
        if access.allowed_origins:
            # Outermost, so that a page can read a refusal too.
            guarded = CORSMiddleware(
                guarded,
                allow_origins=access.allowed_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                max_age=CORS_MAX_AGE_S,
            )
        self._app = guarded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)
