"""Hidden states as JSON, encoded a few at a time: a long prompt has tens of megabytes of them."""

from __future__ import annotations

import asyncio

import orjson

from sapwood.frontends.serving.generate import Choice

VECTORS_AT_A_TIME = 16
"""Vectors that are encoded before other tasks of the loop get a turn: less than a millisecond."""


async def encoded_hidden_states(choice: Choice) -> orjson.Fragment:
    """Hidden states in SGLang's form.

    The first item is [prompt tokens][hidden size]; then comes a vector for each output token except
    the last, which is never computed.
    """
    vectors: list[bytes] = []
    for packed in choice.whole.hidden_states:
        vectors.append(_encoded(packed))
        if len(vectors) % VECTORS_AT_A_TIME == 0:
            await asyncio.sleep(0)
    prompt = _listed(vectors[: choice.last.num_prompt_tokens])
    return orjson.Fragment(_listed([prompt, *vectors[choice.last.num_prompt_tokens :]]))


def encoded_last_hidden_state(choice: Choice) -> orjson.Fragment:
    """The hidden state of the last computed token, as in SGLang's version of OpenAI's dialect.

    An empty list if that token is the prompt's.
    """
    if len(choice.whole.hidden_states) <= choice.last.num_prompt_tokens:
        return orjson.Fragment(b"[]")
    return orjson.Fragment(_encoded(choice.whole.hidden_states[-1]))


def _encoded(packed: bytes) -> bytes:
    """The vectors as JSON, each number with the fewest digits that identify the fp32 number."""
    # Imported here because a gateway that makes chats has no hidden states, and need not have it.
    import numpy as np

    vector = np.frombuffer(packed, dtype="<f4").astype(np.float32, copy=False)
    return orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY)


def _listed(items: list[bytes]) -> bytes:
    return b"[" + b",".join(items) + b"]"
