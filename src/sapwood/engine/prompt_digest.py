"""By what two engines know that they mean the same prompt, computed by the same weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from sapwood.engine.request_state import RequestState


class PromptDigests:
    """Of prompts that one engine reads and another one answers.

    content_of   a digest of what a loaded adapter contains
    num_updates  of the weights since the start. Both engines start with the same ones, and a
                 trainer updates both: where one has had more updates, their digests differ
    """

    def __init__(self, content_of: Callable[[str], str | None]) -> None:
        self._content_of = content_of
        self.num_updates = 0

    def of(self, state: RequestState) -> bytes:
        """Of a request's tokens, of what it shows, and of its weights and its adapter."""
        told = hashlib.sha256(state.key(state.num_prompt_tokens))
        for medium in state.media:
            told.update(medium.digest)
        if self.num_updates or state.adapter:
            content = self._content_of(state.adapter) if state.adapter else ""
            told.update(f"{self.num_updates} {state.adapter_start} {content}".encode())
        return told.digest()
