"""Log probabilities as a scripted engine makes them up: of token t, -t / 256."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from sapwood.schema.logprobs import TokenLogprobs
from sapwood.schema.request import Generate


def logprob_of(token_id: int) -> float:
    return -token_id / 256


def scores(request: Generate, token_ids: Sequence[int]) -> TokenLogprobs:
    """The likeliest are the ids 0, 1, …"""
    options, count = request.options.logprobs, len(token_ids)
    assert options is not None
    likeliest = list(range(options.num_top)) * count
    chosen = list(options.token_ids) * count
    return TokenLogprobs(
        tokens=struct.pack(f"<{count}f", *map(logprob_of, token_ids)),
        top_ids=struct.pack(f"<{len(likeliest)}i", *likeliest),
        top=struct.pack(f"<{len(likeliest)}f", *map(logprob_of, likeliest)),
        chosen=struct.pack(f"<{len(chosen)}f", *map(logprob_of, chosen)),
    )


def score_fields(request: Generate, token_ids: Sequence[int], *, is_first: bool) -> dict[str, Any]:
    """What an output has about them, if the request wants some."""
    if request.options.logprobs is None:
        return {}
    fields: dict[str, Any] = {"logprobs": scores(request, token_ids) if token_ids else None}
    start = request.options.logprobs.prompt_start
    if is_first and start is not None and start < len(request.prompt_ids) - 1:
        fields["prompt_logprobs"] = scores(request, request.prompt_ids[start + 1 :])
    return fields
