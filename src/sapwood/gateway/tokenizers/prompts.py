"""The prompts of forwarded requests as token ids, so that policies compare what caches hold."""

from __future__ import annotations

import msgspec

from sapwood.base.errors import SapwoodError
from sapwood.gateway.fleet import Fleet
from sapwood.gateway.routing_fields import Apart, RoutingFields, packed_ids
from sapwood.gateway.tokenizers.registry import Tokenizers

PATHS = frozenset({"/generate", "/v1/completions"})
PROMPT_CHARACTERS = 64 << 10
"""Of a text, for a choice among workers; encoding these takes some 15 ms, in a thread."""


class _Body(Apart):
    model: str | None = None
    text: str | None = None
    input_ids: list[int] | None = None
    prompt: str | list[int] | None = None


_decode = msgspec.json.Decoder(_Body).decode


class PromptIds:
    """What policies see of a request: the token ids of its prompt, if it has one prompt."""

    def __init__(self, tokenizers: Tokenizers, fleet: Fleet) -> None:
        self._tokenizers = tokenizers
        self._fleet = fleet

    async def fields(self, path: str, body: bytes) -> RoutingFields | None:
        """None: the prompt has no ids here, and its text must do."""
        if path not in PATHS:
            return None
        try:
            told = _decode(body)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return None  # several prompts, or something that is the worker's to refuse
        given = told.prompt
        if path == "/generate":
            given = told.text if told.input_ids is None else told.input_ids
        if not given:
            return None
        model = told.model or ""
        try:
            ids = await self._ids(model, given) if isinstance(given, str) else given
            if ids is None:
                return None
            spelled = b"" if told.is_apart(told.model) else msgspec.json.encode(ids)
            return RoutingFields(told.model, packed_ids(ids), spelled)
        except (SapwoodError, OverflowError):
            return None

    async def _ids(self, model: str, text: str) -> list[int] | None:
        is_only = self._fleet.base_models <= {model}
        loaded = self._tokenizers.of_model(model, is_only=is_only)
        if loaded is None:
            return None
        return await self._tokenizers.encode(
            loaded, text[:PROMPT_CHARACTERS], add_special_tokens=True
        )
