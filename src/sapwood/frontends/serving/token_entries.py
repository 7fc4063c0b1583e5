"""Log probabilities as a list with an object per token, as OpenAI's chat and Ollama have them."""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.frontends.serving.encoded_lists import EncodedList, in_pieces
from sapwood.schema.logprobs import TokenLogprobs
from sapwood.text.token_names import TokenNames


async def token_entries(
    names: TokenNames, token_ids: Sequence[int], values: TokenLogprobs, num_per_token: int
) -> EncodedList:
    """For each token its name, bytes, log probability and the likeliest tokens at its place."""

    def entry(token_id: int, logprob: float) -> dict[str, object]:
        raw = names.raw(token_id)
        return {"token": names.name(token_id), "bytes": list(raw), "logprob": logprob}

    entries = EncodedList()
    async for _, ids, part in in_pieces(token_ids, values, num_per_token):
        positions = zip(ids, part.of_tokens(), part.of_likeliest(), strict=True)
        entries.extend(
            [
                entry(token_id, logprob)
                | {"top_logprobs": [entry(likely_id, likely) for likely, likely_id in likeliest]}
                for token_id, logprob, likeliest in positions
            ]
        )
    return entries
