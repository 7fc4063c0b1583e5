"""Options that change while the server serves, as SGLang's /set_internal_state changes them."""

from __future__ import annotations

from typing import Any, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.serving import control
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.errors import json_response
from sapwood.schema.fields import FieldTable, parse
from sapwood.schema.weights import SetLimits

MOST = 2**31 - 1


class SettingsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /set_internal_state: changes options while the server serves, all of them or none.

    server_args  values by the options' names: max_queued_requests, stream_interval and
                 pp_max_micro_batch_size; the other options are for the start
    """

    server_args: dict[str, Any]


SETTINGS_FIELDS = FieldTable(title="POST /set_internal_state", shape=SettingsRequest)


async def set_internal_state(request: Request, services: Services) -> Response:
    """One true per replica, as SGLang answers."""
    asked = parse(await read_json(request), SETTINGS_FIELDS).server_args
    _check(asked, _ranges(services))
    limits = {name: value for name, value in asked.items() if name != "stream_interval"}
    if limits:
        done = await control.order_weights(services, SetLimits(**limits))
        if not done.done:
            raise InvalidRequest(done.message)
    if "stream_interval" in asked:
        services.generator.stream_interval = asked["stream_interval"]
    services.served.settings.update(asked)
    return json_response([True] * max(1, len(services.replicas)))


def _ranges(services: Services) -> dict[str, tuple[int, int]]:
    """Least and greatest values of the options that can change. A greatest value below the least:
    the option has no effect as the server was started."""
    info = services.engine.info
    num_stages = cast(int, info.options.get("pp_size", 1))
    most_decodes = info.max_running_requests // num_stages if num_stages > 1 else 0
    return {
        "max_queued_requests": (0, MOST),
        "stream_interval": (1, MOST),
        "pp_max_micro_batch_size": (1, most_decodes),
    }


def _check(asked: dict[str, Any], ranges: dict[str, tuple[int, int]]) -> None:
    for name, value in asked.items():
        if name not in ranges:
            raise InvalidRequest(
                f"server_args has {name[:100]!r}, which cannot change while the server serves; "
                f"{', '.join(ranges)} can, and other options are given at the start",
                param="server_args",
            )
        least, most = ranges[name]
        if most < least:
            raise InvalidRequest(
                f"{name} has no effect without --pp-size above 1; leave it out",
                param="server_args",
            )
        if type(value) is not int or not least <= value <= most:
            raise InvalidRequest(
                f"{name} must be a whole number from {least} to {most}",
                param="server_args",
            )
