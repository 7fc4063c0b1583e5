"""The common part of the dialects' sampling fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from sapwood.base.errors import InvalidRequest
from sapwood.schema.fields import Int64, TokenId
from sapwood.schema.limits import StopRegex
from sapwood.schema.sampling import params_of_nothing
from sapwood.schema.unsupported import refuse


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a request that mean what SamplingParams's fields of these names do.

    A dialect's struct inherits from this one and adds what it spells differently. None: the request
    leaves the parameter open.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[TokenId, float] = {}
    allowed_token_ids: list[TokenId] = []
    stop: str | list[str] = []
    stop_regex: StopRegex | list[StopRegex] = []
    stop_token_ids: list[TokenId] = []
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    def given(self) -> dict[str, Any]:
        """The parameters that are not open, as SamplingParams takes them."""
        values = {name: getattr(self, name) for name in SamplingFields.__struct_fields__}
        for name in ("stop", "stop_regex"):
            values[name] = stop_strings(values[name])
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if value is not None
        }


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


def params_of(
    processor: str | None, params: dict[str, Any], name: str = "custom_params"
) -> dict[str, Any]:
    """The parameters of a request's processor, which there must be where there are parameters.

    name  of their field, with its path"""
    if not params or processor:
        return params
    refuse(params_of_nothing(name), name=name)
    return {}


def over_defaults(defaults: Mapping[str, float], **given: float | None) -> dict[str, float]:
    """The model's own defaults, replaced by the sampling parameters that the request has."""
    return {**defaults, **{name: value for name, value in given.items() if value is not None}}
