"""Hidden states as JSON, a few vectors at a time: those of a long prompt are tens of megabytes."""

from __future__ import annotations

import asyncio

import numpy as np
import orjson

from sapwood.frontends.common.generate import Choice

VECTORS_AT_A_TIME = 16
"""Encoded between two looks at what else is to be done: less than a millisecond."""


async def encoded_hidden_states(choice: Choice) -> orjson.Fragment:
    """The prompt's, [prompt tokens][hidden size], then one vector per output token but the last,
    which is not computed any more. As SGLang has them."""
    vectors: list[bytes] = []
    for packed in choice.hidden_states:
        vectors.append(_encoded(packed))
        if len(vectors) % VECTORS_AT_A_TIME == 0:
            await asyncio.sleep(0)
    prompt = _listed(vectors[: choice.num_prompt_tokens])
    return orjson.Fragment(_listed([prompt, *vectors[choice.num_prompt_tokens :]]))


def encoded_last_hidden_state(choice: Choice) -> orjson.Fragment:
    """The vector of the last token that was computed; an empty list if that is the prompt's. As
    SGLang has it in OpenAI's dialect."""
    if len(choice.hidden_states) <= choice.num_prompt_tokens:
        return orjson.Fragment(b"[]")
    return orjson.Fragment(_encoded(choice.hidden_states[-1]))


def _encoded(packed: bytes) -> bytes:
    """Fewest digits that tell one fp32 from another."""
    vector = np.frombuffer(packed, dtype="<f4").astype(np.float32, copy=False)
    return orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY)


def _listed(items: list[bytes]) -> bytes:
    return b"[" + b",".join(items) + b"]"
