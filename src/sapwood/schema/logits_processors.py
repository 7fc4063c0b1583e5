"""Names of custom logits processors, as every process knows them; their code is in the executor."""

from __future__ import annotations

from importlib.metadata import entry_points

import msgspec

ENTRY_POINT = "sapwood.logits_processors"
"""The group of entry points by which other packages add processors."""

BUILT_IN = {"disallowed_tokens": "sapwood.executor.sampling.disallowed_tokens:disallowed_tokens"}


def known_processors() -> frozenset[str]:
    """The names that a request may ask for."""
    return frozenset(BUILT_IN) | {point.name for point in entry_points(group=ENTRY_POINT)}


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
