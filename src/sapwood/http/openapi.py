"""The OpenAPI document, made from the table of endpoints; FastAPI itself sees only raw requests."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.routing import compile_path

from sapwood.http.endpoints import (
    METHODS_WITH_BODY,
    Endpoint,
    EndpointTable,
    Handler,
)
from sapwood.http.errors import ErrorForm

JSON = "application/json"
SSE = "text/event-stream"
BINARY = "application/octet-stream"

_EVENT = {
    "type": "object",
    "description": "One event; data is JSON, or [DONE] at the end.",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}
_SCHEMAS: dict[str, dict[str, Any]] = {SSE: _EVENT, BINARY: {"type": "string", "format": "binary"}}
"""Schemas of answers by content type; any other content type that is not JSON is a text."""

_REF = "#/components/schemas/{name}"


def openapi_document(table: EndpointTable, *, title: str, version: str) -> dict[str, Any]:
    shapes = list(_shapes(table))
    schemas, components = msgspec.json.schema_components(shapes, ref_template=_REF)
    schema_of = dict(zip(shapes, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for dialect in table.dialects:
        for endpoint, handler in dialect.rows:
            if not endpoint.is_documented:
                continue
            for path in endpoint.paths:
                _, path_format, parameters = compile_path(path)
                operations = paths.setdefault(path_format, {})
                for method in endpoint.methods:
                    if method == "HEAD":
                        # Answered because some clients send it; there is nothing to say about it.
                        continue
                    operations[method.lower()] = {
                        "tags": [dialect.name],
                        **_named(handler, path_format, method),
                        **_described(endpoint, method, list(parameters), schema_of),
                        "responses": _responses(
                            endpoint, method, table.error_form(path), schema_of
                        ),
                    }
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        # Either key, or none, where the server was started without.
        "security": [{}, {"bearer": []}, {"header": []}],
    }


def _shapes(table: EndpointTable) -> Iterator[Any]:
    """The types that have a schema in the document: bodies, answers and errors."""
    for endpoint in table:
        if not endpoint.is_documented:
            continue
        if endpoint.body is not None:
            yield endpoint.body
        yield from (answer for answer in endpoint.answers if not isinstance(answer, str))
        if endpoint.refusal is not None and not isinstance(endpoint.refusal, str):
            yield endpoint.refusal
        yield from (table.error_form(path).shape for path in endpoint.paths)


def _named(handler: Handler, path: str, method: str) -> dict[str, str]:
    name = handler.__name__
    told = {
        "summary": name.replace("_", " ").title(),
        "operationId": re.sub(r"\W", "_", f"{name}{path}") + f"_{method.lower()}",
    }
    description = inspect.getdoc(handler)
    return told if description is None else told | {"description": description}


def _described(
    endpoint: Endpoint, method: str, path_parameters: list[str], schema_of: dict[Any, Any]
) -> dict[str, Any]:
    """The part of an operation that describes a call: its parameters and its body."""
    told: dict[str, Any] = {}
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in path_parameters
    ]
    if in_path or endpoint.parameters:
        told["parameters"] = [*in_path, *endpoint.parameters]
    if endpoint.is_deprecated:
        told["deprecated"] = True
    content: dict[str, Any] = {}
    if endpoint.body is not None:
        content[JSON] = {"schema": schema_of[endpoint.body], "example": endpoint.example}
    if endpoint.form is not None:
        content["multipart/form-data"] = {"schema": endpoint.form}
    if content and method in METHODS_WITH_BODY:
        told["requestBody"] = {"required": endpoint.is_body_required, "content": content}
    return told


def _responses(
    endpoint: Endpoint, method: str, errors: ErrorForm, schema_of: dict[Any, Any]
) -> dict[str, Any]:
    content = {}
    for answer in endpoint.answers:
        if isinstance(answer, str):
            content[answer] = {"schema": _SCHEMAS.get(answer, {"type": "string"})}
        else:
            content[JSON] = {"schema": schema_of[answer]}
    refusal = {JSON: {"schema": schema_of[errors.shape]}}
    responses: dict[str, Any] = {"200": {"description": "What was asked for.", "content": content}}
    for status in _statuses(method, errors):
        is_http = status in set(HTTPStatus)
        description = HTTPStatus(status).phrase if is_http else "Overloaded"
        told = refusal
        if status == 400 and isinstance(endpoint.refusal, str):
            told = refusal | {endpoint.refusal: {"schema": {"type": "string"}}}
        elif status == 400 and endpoint.refusal is not None:
            shapes = [schema_of[errors.shape], schema_of[endpoint.refusal]]
            told = {JSON: {"schema": {"anyOf": shapes}}}
        responses[str(status)] = {"description": description, "content": told}
    return responses


def _statuses(method: str, errors: ErrorForm) -> list[int]:
    """Errors that any endpoint may answer with; 401 and 403 where there are keys or origins."""
    common = [400, 401, 403, 404, 500, errors.busy_status]
    return [*common, 408, 413, 504] if method in METHODS_WITH_BODY else common
