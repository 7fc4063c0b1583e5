"""Deltas of one request's output add up."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from sapwood.schema.logprobs import TokenLogprobs
from sapwood.schema.output import Finish, RequestOutput, summed
from sapwood.text.sample import ScoredPrompt, TextChunk


def logprobs(values: list[int]) -> TokenLogprobs | None:
    return TokenLogprobs(tokens=struct.pack(f"<{len(values)}f", *values)) if values else None


@st.composite
def streams(draw: st.DrawFn) -> list[TextChunk]:
    """The chunks of one sample, each with other parts of what a chunk may have."""
    steps = draw(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=6))
    scored, num_output = draw(st.integers(0, len(steps))), 0
    chunks = []
    for index, ids in enumerate(steps):
        num_output += len(ids)
        chunks.append(
            TextChunk(
                index=3,
                text="".join(map(str, ids)),
                token_ids=tuple(ids),
                num_prompt_tokens=5,
                num_output_tokens=num_output,
                num_cached_tokens=index,
                logprobs=logprobs(ids),
                offsets=tuple(ids),
                prompt=ScoredPrompt(token_ids=(1,), logprobs=None) if index == scored else None,
                hidden_states=tuple(bytes([one]) for one in ids),
                finish=Finish(kind="stop") if index + 1 == len(steps) else None,
            )
        )
    return chunks


@given(streams(), st.integers(1, 5))
def test_it_makes_no_difference_in_which_parts_chunks_are_added(
    chunks: list[TextChunk], first: int
) -> None:
    whole = summed(chunks)
    assert whole.token_ids == tuple(one for chunk in chunks for one in chunk.token_ids)
    assert whole.offsets == whole.token_ids
    assert whole.text == "".join(map(str, whole.token_ids))
    assert whole.logprobs == logprobs(list(whole.token_ids))
    assert [*b"".join(whole.hidden_states)] == list(whole.token_ids)
    assert whole.num_output_tokens == len(whole.token_ids)
    assert (whole.num_cached_tokens, whole.finish) == (len(chunks) - 1, Finish(kind="stop"))
    assert (whole.prompt is None) == all(chunk.prompt is None for chunk in chunks)
    parts = [part for part in (chunks[:first], chunks[first:]) if part]
    assert summed([summed(part) for part in parts]) == whole


def test_an_engines_outputs_keep_the_prompts_log_probabilities() -> None:
    told = logprobs([1, 2])
    outputs = [
        RequestOutput(request_id="r", token_ids=[], num_prompt_tokens=3, prompt_logprobs=told),
        RequestOutput(request_id="r", token_ids=[4], num_prompt_tokens=3),
        RequestOutput(request_id="r", token_ids=[5], num_prompt_tokens=3, hidden_states=[b"h"]),
    ]
    assert summed(outputs) == RequestOutput(
        request_id="r",
        token_ids=[4, 5],
        num_prompt_tokens=3,
        prompt_logprobs=told,
        hidden_states=[b"h"],
    )
