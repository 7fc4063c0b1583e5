"""Log probabilities of a prompt, put into the answer of a worker that has not read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from sapwood.gateway.client import ConnectionBroken

MAX_BYTES = 64 << 20
"""Of an answer with log probabilities."""
_KEYS = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")
_DATA = b"data:"

Told = Mapping[str, list[Any]]
"""Field of `meta_info` -> a value per token."""


def of_prefill(body: bytes) -> dict[int, Told]:
    """What a prefill worker's answer says of each prompt, by number; ConnectionBroken if it is no
    such answer. body: one object, a list of these, or events of a stream."""
    try:
        if body.lstrip().startswith((b"{", b"[")):
            told = orjson.loads(body)
            outputs = list(enumerate(told if isinstance(told, list) else [told]))
        else:
            events = [orjson.loads(line) for line in _data_lines(body)]
            outputs = [(_index(told), told) for told in events]
    except orjson.JSONDecodeError as error:
        raise ConnectionBroken(f"the prompt's log probabilities are no JSON: {error}") from None
    found: dict[int, Told] = {}
    for index, output in outputs:
        meta = output.get("meta_info") if isinstance(output, dict) else None
        if isinstance(meta, dict):
            found[index] = {key: meta[key] for key in _KEYS if isinstance(meta.get(key), list)}
    return found


class PromptLogprobs:
    """Puts them in front of what the other worker tells of the prompt.

    A stream is passed on event by event, any other answer when it is whole.
    """

    def __init__(self, told: Mapping[int, Told], *, is_stream: bool) -> None:
        self._told = told
        self._is_stream = is_stream
        self._rest = bytearray()

    def passed(self, piece: bytes, *, is_complete: bool) -> bytes:
        """ConnectionBroken if the answer cannot be read."""
        looked_at = max(0, len(self._rest) - 1)
        self._rest += piece
        if len(self._rest) > MAX_BYTES:
            raise ConnectionBroken(f"an event or answer has more than {MAX_BYTES} bytes")
        if is_complete:
            end = len(self._rest)
        else:
            end = self._rest.rfind(b"\n\n", looked_at) + 2 if self._is_stream else 0
        if end < 2:
            return b""
        whole = bytes(self._rest[:end])
        del self._rest[:end]
        if self._is_stream:
            return b"".join(self._event(line) for line in whole.splitlines(keepends=True))
        return self._answer(whole)

    def _answer(self, body: bytes) -> bytes:
        told = _parsed(body)
        for index, output in enumerate(told if isinstance(told, list) else [told]):
            self._add(output, index)
        return orjson.dumps(told)

    def _event(self, line: bytes) -> bytes:
        if not line.startswith(_DATA) or line[len(_DATA) :].strip() == b"[DONE]":
            return line
        told = _parsed(line[len(_DATA) :])
        self._add(told, _index(told))
        return b"data: " + orjson.dumps(told) + b"\n"

    def _add(self, output: object, index: int) -> None:
        meta = output.get("meta_info") if isinstance(output, dict) else None
        if not isinstance(meta, dict):
            return
        for key, values in self._told.get(index, {}).items():
            own = meta.get(key)
            if isinstance(own, list):
                meta[key] = [*values, *own]


def _data_lines(body: bytes) -> list[bytes]:
    lines = (line[len(_DATA) :].strip() for line in body.splitlines() if line.startswith(_DATA))
    return [line for line in lines if line and line != b"[DONE]"]


def _index(told: object) -> int:
    index = told.get("index", 0) if isinstance(told, dict) else 0
    return index if isinstance(index, int) else 0


def _parsed(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ConnectionBroken(f"the answer is no JSON: {error}") from None
