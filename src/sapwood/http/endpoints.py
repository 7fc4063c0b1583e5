"""The table of endpoints: the only place that says what a path is for and who may call it.

A dialect is a table of endpoints. The routes of the application, the OpenAPI document, the check of
keys, the rule about other origins and the form of errors are all derived from these tables. So an
endpoint cannot be forgotten in one of them, and cannot exist without a declared access.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeVar, get_args

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route, compile_path
from starlette.types import Receive, Scope, Send

from sapwood.http.errors import NATIVE_ERRORS, ErrorForm

AccessLevel = Literal["open", "user", "admin"]
Handler = Callable[[Request], Awaitable[Response]]
G = TypeVar("G")
GivenHandler = Callable[[Request, G], Awaitable[Response]]

METHODS_WITH_BODY = frozenset({"POST", "PUT"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Paths that one handler answers, and everything that is said about them.

    paths           whole paths as Starlette writes them, for instance "/v1/models/{model:path}"
    access          open: anybody may call the endpoint. user: the caller needs the API key, if the
                    server has one. admin: the endpoint steers the server or concerns the requests
                    of others, and the caller needs the admin key, if the server has one
    get_has_effect  whether a GET changes something or computes, so that web pages of other origins
                    may not send it; every GET of an admin endpoint counts as such
    errors          how errors are spelled; None: as the dialect says for the path's beginning
    body            the schema of a POST's or PUT's JSON
    form            the schema of a POST's multipart form, where the body is no JSON
    example         an example of the JSON body
    answers         the schema of the JSON that a 200 has, and the content types of other answers
    refusal         the schema, or the media type, of a 400 that is no error of the dialect; None:
                    there is no other
    parameters      query parameters, made by `query_parameter`; path parameters are in the path
    is_documented   whether the OpenAPI document has the endpoint
    """

    paths: tuple[str, ...]
    methods: tuple[str, ...]
    access: AccessLevel
    get_has_effect: bool = False
    errors: ErrorForm | None = None
    body: type[msgspec.Struct] | None = None
    is_body_required: bool = True
    form: Mapping[str, Any] | None = None
    example: Mapping[str, Any] | None = None
    answers: tuple[Any, ...] = ()
    refusal: type[msgspec.Struct] | str | None = None
    parameters: tuple[dict[str, Any], ...] = ()
    is_documented: bool = True
    is_deprecated: bool = False

    def __post_init__(self) -> None:
        where = f"the endpoint {', '.join(self.paths)}"
        if self.access not in get_args(AccessLevel):
            raise ValueError(
                f"{where}: access is {self.access!r} but must be one of {get_args(AccessLevel)}"
            )
        if not self.is_documented:
            return
        if not self.answers:
            raise ValueError(f"{where} is documented, but does not say what it answers")
        if self.body is not None and self.example is None:
            raise ValueError(f"{where} takes a body, but has no example of one")

    @property
    def answered_methods(self) -> tuple[str, ...]:
        """With HEAD where there is a GET: load balancers ask so whether a server is healthy."""
        if "GET" in self.methods and "HEAD" not in self.methods:
            return (*self.methods, "HEAD")
        return self.methods

    def has_effect(self, method: str) -> bool:
        """Whether a call with that method changes something or costs computation."""
        return method not in SAFE_METHODS or self.access == "admin" or self.get_has_effect


class Dialect:
    """The endpoints of one API as a table, to which `serves` adds a row.

    name    the tag of the dialect's operations in the OpenAPI document
    errors  by the beginning of paths, for instance "/v1": how errors are spelled at all paths that
            begin so, whether there is an endpoint or not; the longest beginning counts
    """

    def __init__(
        self, name: str, *, errors: Mapping[str, ErrorForm] = MappingProxyType({})
    ) -> None:
        self.name = name
        self.errors = errors
        self.rows: list[tuple[Endpoint, Handler]] = []

    def serves(self, endpoint: Endpoint) -> Callable[[Handler], Handler]:
        """A decorator for the endpoint's handler, whose name names the operation."""

        def add(handler: Handler) -> Handler:
            self.rows.append((endpoint, handler))
            return handler

        return add


class EndpointRows(Generic[G]):
    """A dialect's table before it is known what its handlers are given besides the request.

    So a module may have a dialect's endpoints and handlers one after another, and `dialect` gives
    them what they answer with.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[Endpoint, GivenHandler[G]]] = []

    def serves(self, endpoint: Endpoint) -> Callable[[GivenHandler[G]], GivenHandler[G]]:
        """A decorator for the endpoint's handler, whose name names the operation."""

        def add(handler: GivenHandler[G]) -> GivenHandler[G]:
            self._rows.append((endpoint, handler))
            return handler

        return add

    def dialect(
        self, name: str, given: G, *, errors: Mapping[str, ErrorForm] = MappingProxyType({})
    ) -> Dialect:
        """The dialect whose handlers are given that."""
        made = Dialect(name, errors=errors)
        for endpoint, handler in self._rows:
            made.serves(endpoint)(_given(handler, given))
        return made


def _given(handler: GivenHandler[G], given: G) -> Handler:
    @wraps(handler)
    async def answer(request: Request) -> Response:
        return await handler(request, given)

    return answer


class EndpointTable:
    """All endpoints of an application.

    Raises ValueError if two endpoints could answer the same call, or two dialects spell the errors
    of the same paths.
    """

    def __init__(self, dialects: Sequence[Dialect]) -> None:
        self.dialects = tuple(dialects)
        by_path: dict[str, list[Endpoint]] = {}
        self._errors: dict[str, ErrorForm] = {}
        for dialect in dialects:
            for beginning, form in dialect.errors.items():
                if self._errors.setdefault(beginning, form) is not form:
                    raise ValueError(f"two dialects spell the errors below {beginning}")
            for endpoint, _ in dialect.rows:
                for path in endpoint.paths:
                    by_path.setdefault(path, []).append(endpoint)
        self._fixed = {path: told for path, told in by_path.items() if "{" not in path}
        self._patterns = [
            (compile_path(path)[0], told) for path, told in by_path.items() if "{" in path
        ]
        self._declared = {(path, method) for path, told in by_path.items() for method in _all(told)}
        for path in by_path:
            # A pattern matches itself, as text.
            methods = _all(self.at(path))
            twice = {method for method in methods if methods.count(method) > 1}
            if twice:
                raise ValueError(f"two endpoints answer {', '.join(sorted(twice))} {path}")

    def __iter__(self) -> Iterator[Endpoint]:
        return (endpoint for dialect in self.dialects for endpoint, _ in dialect.rows)

    def at(self, path: str) -> Iterator[Endpoint]:
        """The endpoints of a path that was called, whatever the method."""
        yield from self._fixed.get(path, ())
        for pattern, endpoints in self._patterns:
            if pattern.match(path):
                yield from endpoints

    def find(self, method: str, path: str) -> Endpoint | None:
        """The endpoint that answers the call; if no method fits, any endpoint of the path."""
        for endpoint in self._fixed.get(path, ()):
            if method in endpoint.answered_methods:
                return endpoint
        first = None
        for endpoint in self.at(path):
            if method in endpoint.answered_methods:
                return endpoint
            first = first or endpoint
        return first

    def methods(self, path: str) -> list[str]:
        """What a call of that path may have as its method."""
        return sorted(
            {method for endpoint in self.at(path) for method in endpoint.answered_methods}
        )

    def error_form(self, path: str) -> ErrorForm:
        """How errors are spelled at that path, whether there is an endpoint or not."""
        for endpoint in self.at(path):
            if endpoint.errors is not None:
                return endpoint.errors
        beginnings = [
            beginning
            for beginning in self._errors
            if path == beginning or path.startswith(f"{beginning}/")
        ]
        return self._errors[max(beginnings, key=len)] if beginnings else NATIVE_ERRORS

    def mount(self, app: FastAPI) -> None:
        for dialect in self.dialects:
            for endpoint, handler in dialect.rows:
                for path in endpoint.paths:
                    app.router.routes.append(
                        EndpointRoute(path, handler, endpoint.answered_methods)
                    )

    def check_routes(self, routes: Iterable[BaseRoute]) -> None:
        """RuntimeError if one of an application's routes is in no dialect's table.

        Nobody would have said who may call that route, so it would be open to every user.
        """
        for route in routes:
            path, methods = getattr(route, "path", ""), getattr(route, "methods", None)
            if not methods or any((path, method) not in self._declared for method in methods):
                raise RuntimeError(
                    f"{route!r} is no endpoint of a dialect; declare it in the dialect's table, "
                    "with its access"
                )


class EndpointRoute(Route):
    """One path of an endpoint, which names itself in the scope of a call as `route`.

    FastAPI's own kind of route looks for parameters in the handler's signature, which took most of
    the time in which an application is made.
    """

    def __init__(self, path: str, handler: Handler, methods: Sequence[str]) -> None:
        super().__init__(path, handler, methods=methods)
        self.methods = set(methods)  # without a HEAD that nobody declared

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        if match is not Match.NONE:
            found["route"] = self
        return match, found

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().handle(_as_get(scope), receive, send)


class FixedRoutes(BaseRoute):
    """The routes of all paths without parameters, of which one look-up finds the called one.

    A router tries its routes one after another, so the last of many would cost the most.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, dict[str, Handler]] = {}

    def add(self, path: str, methods: Sequence[str], handler: Handler) -> None:
        of_path = self._handlers.setdefault(path, {})
        for method in methods:
            of_path[method] = handler

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        found = self._handlers.get(scope["path"]) if scope["type"] == "http" else None
        if found is None:
            return Match.NONE, {}
        handler = found.get(scope["method"])
        if handler is None:
            return Match.PARTIAL, {}
        return Match.FULL, {"endpoint": handler, "path_params": {}}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler: Handler | None = scope.get("endpoint")
        if handler is None:
            raise HTTPException(405)
        scope = _as_get(scope)
        response = await handler(Request(scope, receive, send))
        await response(scope, receive, send)


def _as_get(scope: Scope) -> Scope:
    """A HEAD is answered as the GET of the same path, by handlers and by servers behind them; the
    HTTP server, which has the scope that came, leaves the body out."""
    return {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope


def _all(endpoints: Iterable[Endpoint]) -> list[str]:
    return [method for endpoint in endpoints for method in endpoint.answered_methods]


def query_parameter(name: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema}
