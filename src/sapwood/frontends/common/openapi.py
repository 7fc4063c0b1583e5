"""Request structs in the OpenAPI document; FastAPI itself sees only raw requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec

_REF = "#/components/schemas/{name}"


def json_body(shape: type[msgspec.Struct], *, required: bool = True) -> dict[str, Any]:
    """For a route's `openapi_extra`."""
    schema = {"$ref": _REF.format(name=shape.__name__)}
    return {
        "requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}
    }


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """An error as the routes below /v1 send it; param: the field at fault, if one is."""

    object: str
    message: str
    type: str
    param: str | None
    code: int


class NestedError(msgspec.Struct, frozen=True, kw_only=True):
    """An error as the native routes and /v1/responses send it."""

    error: Error


ERROR_BODIES = (Error, NestedError)


def described(
    answer: type[msgspec.Struct] | None,
    *,
    body: type[msgspec.Struct] | None = None,
    parameters: Sequence[dict[str, Any]] = (),
    errors: Sequence[int] = (400,),
    error: type[msgspec.Struct] = Error,
    also: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A route's whole `openapi_extra`; its handler takes nothing but the request.

    answer      what a 200 has; None: no JSON, and `also` says what instead
    parameters  from `path_parameter` and `query_parameter`
    error       the body that each status of `errors` has
    also        further content types of a 200, with the format of their schema
    """
    content: dict[str, Any] = {}
    if answer is not None:
        content["application/json"] = {"schema": {"$ref": _REF.format(name=answer.__name__)}}
    for kind, form in (also or {}).items():
        content[kind] = {"schema": {"type": "string", "format": form}}
    refusal = {"application/json": {"schema": {"$ref": _REF.format(name=error.__name__)}}}
    extra: dict[str, Any] = {} if body is None else json_body(body)
    extra["responses"] = {"200": {"description": "Successful Response", "content": content}} | {
        str(status): {"description": HTTPStatus(status).phrase, "content": refusal}
        for status in errors
    }
    if parameters:
        extra["parameters"] = list(parameters)
    return extra


def path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def query_parameter(name: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema}


def component_schemas(shapes: Sequence[type[msgspec.Struct]]) -> dict[str, Any]:
    _, components = msgspec.json.schema_components(shapes, ref_template=_REF)
    return components
