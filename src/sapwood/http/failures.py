"""What becomes of the exceptions of an application's handlers: errors in the form of their path."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sapwood.base.errors import NotFound, SapwoodError
from sapwood.http.endpoints import EndpointTable
from sapwood.http.errors import WrongMethod, error_response, internal_error
from sapwood.http.sse import Disconnected


def answer_errors(app: Starlette, endpoints: EndpointTable) -> None:
    """From now on the application answers errors as its table of endpoints says."""
    app.state.endpoints = endpoints
    app.add_exception_handler(SapwoodError, _refused)
    app.add_exception_handler(HTTPException, _not_routed)
    app.add_exception_handler(Disconnected, _left)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(Exception, _failed)


def _endpoints(request: Request) -> EndpointTable:
    endpoints: EndpointTable = request.app.state.endpoints
    return endpoints


def _answer(request: Request, error: SapwoodError) -> Response:
    return error_response(error, _endpoints(request).error_form(request.url.path).body)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, SapwoodError)
    return _answer(request, error)


async def _not_routed(request: Request, error: Exception) -> Response:
    """Answer calls with an unknown path or method; the framework raises no other error here."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    if error.status_code != 405:
        return _answer(request, NotFound(f"there is no {method} {path}; see /docs"))
    response = _answer(request, WrongMethod(f"{path} does not take {method}; see /docs"))
    response.headers["Allow"] = ", ".join(_endpoints(request).methods(path))
    return response


async def _left(request: Request, error: Exception) -> Response:
    """Nobody reads this answer; access logs show 499 for a client that has left."""
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    """A bug of ours: the framework raises it again for the server's log after this answer."""
    return _answer(request, internal_error())
