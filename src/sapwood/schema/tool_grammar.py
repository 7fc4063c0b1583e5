"""Grammars that make an output a list of tool calls, for tool_choice "required" or a named tool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sapwood.schema.grammar import Grammar, json_schema


def tool_call_list(
    tools: Sequence[tuple[str, Mapping[str, Any] | bool]], *, at_most_one: bool = False
) -> Grammar:
    """A JSON list of at least one `{"name": …, "parameters": {…}}`.

    tools        (name, JSON Schema of the parameters) of each tool that may be called
    at_most_one  exactly one call, as for a named tool or without parallel calls
    """
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for number, (name, parameters) in enumerate(tools):
        key = f"tool_{number}"
        definitions[key] = moved(parameters, f"#/$defs/{key}")
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": name},
                    "parameters": {"$ref": f"#/$defs/{key}"},
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    items = calls[0] if len(calls) == 1 else {"anyOf": calls}
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": items, "$defs": definitions}
    if at_most_one:
        schema["maxItems"] = 1
    return json_schema(schema, param="tools")


def moved(schema: Any, root: str) -> Any:
    """The schema as a part of a larger schema: its references to itself start at `root`."""
    if isinstance(schema, list):
        return [moved(element, root) for element in schema]
    if not isinstance(schema, Mapping):
        return schema
    result = {key: moved(value, root) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        result["$ref"] = root + reference[1:]
    return result
