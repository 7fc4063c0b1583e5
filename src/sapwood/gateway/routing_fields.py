"""What the gateway reads of a request's body: the model's name, and where the prompt is.

Only these members of the JSON object are looked at, and their values are taken as the bytes that
spell them: a conversation's next request spells the same beginning in the same way. So nothing is
decoded, and a field that is wrong is the worker's to refuse.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

MAX_TEXT_BYTES = 256 << 10
"""Bytes of a prompt that policies look at. A single one shall not fill the tree of prompts."""

MAX_PARTS = 64
MAX_PART_HEAD = 2048
_BOUNDARY = re.compile(
    rb"(?i)^multipart/form-data;.*?boundary=(?:\"([^\"]{1,200})\"|([^\s;]{1,200}))"
)
_NAMES_MODEL = re.compile(rb"(?i)[;\s]name=\"?model\"?(?:[;\s]|$)")
_EMPTY = msgspec.Raw()
_NO_TEXT = (b"", b"null", b'""')
_ID_BEGINS = frozenset(b"%c" % byte for byte in b"[0123456789")


class Apart(msgspec.Struct):
    """Fields of a body with which a prompt shares a cache with few others."""

    extra_key: msgspec.Raw = _EMPTY
    cache_salt: msgspec.Raw = _EMPTY
    lora_path: msgspec.Raw = _EMPTY

    def is_apart(self, model: str | None) -> bool:
        """model: by its name a request may choose an adapter"""
        told = (self.extra_key, self.cache_salt, self.lora_path)
        return any(bytes(part) not in _NO_TEXT for part in told) or ":" in (model or "")


class _Body(Apart):
    model: msgspec.Raw = _EMPTY
    # In the order in which chat templates put them.
    tools: msgspec.Raw = _EMPTY
    system: msgspec.Raw = _EMPTY
    instructions: msgspec.Raw = _EMPTY
    messages: msgspec.Raw = _EMPTY
    prompt: msgspec.Raw = _EMPTY
    text: msgspec.Raw = _EMPTY
    input_ids: msgspec.Raw = _EMPTY
    input: msgspec.Raw = _EMPTY


_decode = msgspec.json.Decoder(_Body).decode


@dataclass(frozen=True, slots=True)
class RoutingFields:
    """model  None if the body names none, or is no JSON object
    text   of the prompt, as spelled, or its packed token ids
    ids    the prompt's token ids, as JSON spells them, if it has some and shares its cache with all
           others
    """

    model: str | None = None
    text: bytes = b""
    ids: bytes = b""


_NOTHING = RoutingFields()


def packed_ids(ids: Sequence[int]) -> bytes:
    """Token ids as a text for policies: four bytes each, so that equal beginnings are equal."""
    return array("I", ids[: MAX_TEXT_BYTES // 4]).tobytes()


def routing_fields(body: bytes) -> RoutingFields:
    try:
        told = _decode(body)
        model = msgspec.json.decode(told.model, type=str) if told.model else None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return _NOTHING
    parts = (
        told.tools,
        told.system,
        told.instructions,
        told.messages,
        told.prompt,
        told.text,
        told.input_ids,
        told.input,
    )
    pieces = [memoryview(part)[:MAX_TEXT_BYTES] for part in parts if len(memoryview(part))]
    return RoutingFields(model, b"".join(pieces)[:MAX_TEXT_BYTES], _ids(told, model))


def form_fields(body: bytes, content_type: bytes) -> RoutingFields:
    """The same of a multipart form, whose text no policy looks at: the part with the model's name.
    Pictures beside it are not read."""
    found = _BOUNDARY.search(content_type)
    if found is None:
        return _NOTHING
    mark = b"--" + (found[1] or found[2])
    start = body.find(mark)
    for _ in range(MAX_PARTS):
        end = body.find(mark, start + len(mark)) if start >= 0 else -1
        if end < 0:
            break
        head_end = body.find(b"\r\n\r\n", start, min(end, start + MAX_PART_HEAD))
        if head_end >= 0 and _NAMES_MODEL.search(body, start, head_end):
            value = body[head_end + 4 : min(end, head_end + MAX_PART_HEAD)].removesuffix(b"\r\n")
            return RoutingFields(value.decode("utf-8", "replace"))
        start = end
    return _NOTHING


def _ids(told: _Body, model: str | None) -> bytes:
    if told.is_apart(model):
        return b""
    ids = bytes(told.input_ids or told.prompt)
    return ids if ids[:1] == b"[" and ids[1:].lstrip()[:1] in _ID_BEGINS else b""
