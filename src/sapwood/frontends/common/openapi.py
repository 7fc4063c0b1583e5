"""Request structs in the OpenAPI document; FastAPI itself sees only raw requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

_REF = "#/components/schemas/{name}"


def json_body(shape: type[msgspec.Struct], *, required: bool = True) -> dict[str, Any]:
    """For a route's `openapi_extra`."""
    schema = {"$ref": _REF.format(name=shape.__name__)}
    return {
        "requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}
    }


def component_schemas(shapes: Sequence[type[msgspec.Struct]]) -> dict[str, Any]:
    _, components = msgspec.json.schema_components(shapes, ref_template=_REF)
    return components
