"""The common part of the dialects' sampling fields."""

from __future__ import annotations

from collections.abc import Mapping

from sapwood.base.errors import InvalidRequest


def stop_strings(stop: str | list[str]) -> tuple[str, ...]:
    if isinstance(stop, str):
        return (stop,) if stop else ()
    return tuple(stop)


def renamed(error: InvalidRequest, names: Mapping[str, str], *, where: str = "") -> InvalidRequest:
    """The same error, but with the field's name and path in the client's own request."""
    if error.param is None:
        return error
    wire_name = names.get(error.param, error.param)
    path = f"{where}.{wire_name}" if where else wire_name
    return InvalidRequest(error.message.replace(error.param, wire_name), param=path)


def over_defaults(defaults: Mapping[str, float], **given: float | None) -> dict[str, float]:
    """The model's own defaults, replaced by the sampling parameters that the request has."""
    return {**defaults, **{name: value for name, value in given.items() if value is not None}}
