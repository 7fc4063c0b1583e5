"""Which experts computed each token, in SGLang's form."""

from __future__ import annotations

import asyncio
from base64 import b64encode

from sapwood.frontends.serving.generate import Choice


async def encoded_routed_experts(choice: Choice) -> str:
    """Base64 of int32 [tokens - 1, layers, experts of a token], little endian.

    Of prompt and output, without the last output token, which is never computed."""
    return await asyncio.to_thread(_encoded, choice.whole.routed_experts)


def _encoded(parts: tuple[bytes, ...]) -> str:
    return b64encode(b"".join(parts)).decode("ascii")
