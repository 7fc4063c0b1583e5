"""Sampling parameters from a Python program: their names, types and ranges are checked."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.serving.sampling import stop_strings
from sapwood.schema import grammar as grammars
from sapwood.schema.grammar import Grammar
from sapwood.schema.sampling import SamplingParams

_NAMES = SamplingParams.__struct_fields__
_OTHER_NAMES = {"sampling_seed": "seed", "stop_strings": "stop"}
"""Names that other interfaces have for some parameters, where spelling alone gives no hint."""

_GRAMMARS: dict[str, Callable[[Any], Grammar]] = {
    "json_schema": grammars.json_schema,
    "regex": grammars.regex,
    "ebnf": grammars.ebnf,
    "structural_tag": grammars.structural_tag,
    "choice": grammars.choice,
}

Sampling = SamplingParams | Mapping[str, Any] | None


def sampling_params(given: Sampling, defaults: Mapping[str, float]) -> SamplingParams:
    """The sampling parameters of one prompt, checked.

    given     a mapping: parameters that it does not have come from `defaults` (the model's own) or
              from SamplingParams. Or a SamplingParams, which is used without the model's defaults
    Raises    InvalidRequest, which names the parameter
    """
    if isinstance(given, SamplingParams):
        # Its types were not checked when it was built: stop="ab" would mean "a" or "b".
        values: dict[str, Any] = msgspec.to_builtins(given)
    else:
        values = {**defaults, **(given or {})}
    _take_grammar(values)
    for name in values:
        if name not in _NAMES:
            raise _unknown(str(name))
    for name in ("stop", "stop_regex"):
        if isinstance(values.get(name), str):
            values[name] = stop_strings(values[name])
    try:
        return msgspec.convert(values, SamplingParams, str_keys=True)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).replace("`", "").partition(" - at ")
        name = path.removeprefix("key in ").removeprefix("$.")
        problem = problem[:1].lower() + problem[1:]
        param = name.partition("[")[0]
        raise InvalidRequest(f"{name}: {problem}", param=param) from error


def _take_grammar(values: dict[str, Any]) -> None:
    """Replace the parameter that constrains the output by `grammar`, as builtins."""
    given = {name: values.pop(name) for name in _GRAMMARS if name in values}
    asked = {name: value for name, value in given.items() if value is not None}
    if values.get("grammar") is not None:
        asked["grammar"] = values["grammar"]
    if len(asked) > 1:
        raise InvalidRequest(
            f"{' and '.join(asked)} both say what the output must look like; give one of them",
            param=next(iter(asked)),
        )
    for name, value in asked.items():
        if name == "json_schema":
            # A pydantic model, or any other object that has a schema.
            of_model = getattr(value, "model_json_schema", None)
            value = value if of_model is None else of_model()
        made = value if name == "grammar" else _GRAMMARS[name](value)
        values["grammar"] = msgspec.to_builtins(made)


def _unknown(name: str) -> InvalidRequest:
    close = [_OTHER_NAMES[name]] if name in _OTHER_NAMES else []
    close = close or difflib.get_close_matches(name, _NAMES, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(_NAMES)}"
    return InvalidRequest(f"unknown sampling parameter {name!r}; {hint}", param=name)
