"""Names of custom logits processors, as every process knows them; their code is in the executor."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.metadata import entry_points
from typing import Any

import msgspec

from sapwood.base.errors import InvalidRequest
from sapwood.schema import limits

ENTRY_POINT = "sapwood.logits_processors"
"""The group of entry points by which other packages add processors."""

DISALLOWED_TOKENS = "disallowed_tokens"

BUILT_IN = {DISALLOWED_TOKENS: "sapwood.executor.sampling.disallowed_tokens:disallowed_tokens"}


def known_processors() -> frozenset[str]:
    """The names that a request may ask for."""
    return frozenset(BUILT_IN) | {point.name for point in entry_points(group=ENTRY_POINT)}


def check_processor(asked: str, known: Collection[str], allow_code: bool) -> None:
    """InvalidRequest unless the server may run what a custom_logit_processor names or brings.

    known       names of registered processors
    allow_code  whether a request may bring code
    """
    param = "custom_logit_processor"
    if code_of(asked) is not None:
        if not allow_code:
            raise InvalidRequest(
                f"{param} brings code, which this server does not run; name a registered "
                "processor, or start the server with --enable-custom-logit-processor",
                param=param,
            )
    elif asked not in known:
        names = ", ".join(sorted(known)) or "none"
        raise InvalidRequest(
            f"{param} {asked[:80]!r} is not registered here; known: {names}", param=param
        )


def disallowed_token_ids(params: Mapping[str, Any]) -> list[int]:
    """The token ids in the custom_params of "disallowed_tokens".

    Raises InvalidRequest if there are none, or other parameters."""
    token_ids = params.get("token_ids")
    if isinstance(token_ids, list):
        limits.DISALLOWED_TOKENS.check(len(token_ids), "custom_params", hint="send each id once")
    if isinstance(token_ids, list) and token_ids and set(params) == {"token_ids"}:
        ids: list[int] = [token_id for token_id in token_ids if type(token_id) is int]
        if len(ids) == len(token_ids):
            return ids
    raise InvalidRequest(
        'custom_params must be {"token_ids": [...]} with at least one token id, for the '
        f"custom_logit_processor {DISALLOWED_TOKENS!r}",
        param="custom_params",
    )


class _Code(msgspec.Struct):
    callable: str


def code_of(asked: str) -> str | None:
    """The code, in hexadecimal digits, in a `custom_logit_processor` that brings some; None if the
    value is a name."""
    if not asked.lstrip().startswith("{"):
        return None
    try:
        return msgspec.json.decode(asked, type=_Code).callable
    except (msgspec.DecodeError, RecursionError):
        # Something that begins like code is not a name; it will fail to be read as code.
        return ""
