"""What the dialects' sampling fields have in common."""

from __future__ import annotations

from collections.abc import Mapping

from sapwood.base.errors import InvalidRequest


def stop_strings(stop: str | list[str]) -> tuple[str, ...]:
    if isinstance(stop, str):
        return (stop,) if stop else ()
    return tuple(stop)


def renamed(error: InvalidRequest, names: Mapping[str, str], *, where: str = "") -> InvalidRequest:
    """That error, speaking of the field by the name and path that the client used."""
    if error.param is None:
        return error
    wire_name = names.get(error.param, error.param)
    path = f"{where}.{wire_name}" if where else wire_name
    return InvalidRequest(error.message.replace(error.param, wire_name), param=path)


def over_defaults(defaults: Mapping[str, float], **given: float | None) -> dict[str, float]:
    """What a request gave of these sampling parameters, over the model's own defaults."""
    return {**defaults, **{name: value for name, value in given.items() if value is not None}}
