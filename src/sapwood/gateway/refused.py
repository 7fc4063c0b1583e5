"""Endpoints of engines that cannot work through the gateway, refused with the way out."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import UnsupportedFeature
from sapwood.gateway.forwarded import FORMS
from sapwood.http.endpoints import Dialect, Endpoint


def refused_dialect(*, has_parsers: bool) -> Dialect:
    """/v1/files and /v1/batches: an engine keeps files and batches on its own disk, so another
    engine could not find them, and a batch would run on one engine however many there are.

    has_parsers  whether the packages for parsing at the gateway are installed
    """
    dialect = Dialect("refused", errors=FORMS)

    def serve(paths: tuple[str, ...], message: str) -> None:
        @dialect.serves(
            Endpoint(
                paths=paths, methods=("GET", "POST", "DELETE"), access="user", is_documented=False
            )
        )
        async def refuse(request: Request) -> Response:
            raise UnsupportedFeature(message)

    if not has_parsers:

        @dialect.serves(
            Endpoint(
                paths=("/parse/function_call", "/parse/reasoning"),
                methods=("POST",),
                access="admin",
                is_documented=False,
            )
        )
        async def parse(request: Request) -> Response:
            raise UnsupportedFeature(
                "parsing at the gateway needs the packages tokenizers and jinja2; install them "
                "with `pip install tokenizers jinja2`, or ask an engine's /parse_function_call or "
                "/separate_reasoning"
            )

    for name in ("files", "batches"):
        serve(
            (f"/v1/{name}", f"/v1/{name}/{{rest:path}}"),
            f"the gateway does not pass on /v1/{name}: files and batches are kept by the engine "
            "that gets them, and the others do not know them; send these requests to the address "
            "of one engine, or the lines of the batch to the gateway as single requests",
        )
    serve(
        ("/v1/messages/batches", "/v1/messages/batches/{rest:path}"),
        "the gateway does not pass on /v1/messages/batches, which the engines do not have; send "
        "each message as a request to /v1/messages",
    )
    return dialect
