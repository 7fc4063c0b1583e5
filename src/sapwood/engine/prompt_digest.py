"""By what two engines know that they mean the same prompt."""

from __future__ import annotations

import hashlib

from sapwood.engine.request_state import RequestState


def digest_of(state: RequestState) -> bytes:
    """Of a request's tokens, and of what it shows."""
    told = hashlib.sha256(state.key(state.num_prompt_tokens))
    for medium in state.media:
        told.update(medium.digest)
    return told.digest()
