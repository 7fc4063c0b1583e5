"""A transcription's tokens keep transformers' rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sapwood.executor.sampling.speech import SpeechTokens
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.speech import SpeechRules
from sapwood.schema.step import RowStart

END, NO_TIMES, FIRST, VOCAB = 20, 24, 25, 45
RULES = SpeechRules(
    suppressed=(3, 4, NO_TIMES),
    suppressed_first=(7, END),
    end=END,
    first_time=FIRST,
    latest_start=5,
)


def start(row: int, rules: SpeechRules | None, output: tuple[int, ...] = ()) -> RowStart:
    options = RequestOptions(sampling=SamplingParams(speech=rules))
    return RowStart(row=row, options=options, seed=0, prompt_ids=[1, 2], output_ids=list(output))


def expected(output: tuple[int, ...], logits: torch.Tensor) -> torch.Tensor:
    from transformers import GenerationConfig, WhisperConfig
    from transformers.generation.logits_process import (
        SuppressTokensAtBeginLogitsProcessor,
        SuppressTokensLogitsProcessor,
        WhisperTimeStampLogitsProcessor,
    )

    config = GenerationConfig(
        eos_token_id=END, no_timestamps_token_id=NO_TIMES, max_initial_timestamp_index=5
    )
    assert WhisperConfig is not None
    ids = torch.tensor([[1, 2, *output]])
    scores = logits[None].clone()
    for one in (
        SuppressTokensLogitsProcessor(RULES.suppressed),
        SuppressTokensAtBeginLogitsProcessor(RULES.suppressed_first, 2),
        WhisperTimeStampLogitsProcessor(config, begin_index=2),
    ):
        scores = one(ids, scores)
    return scores[0]


@given(
    st.lists(st.one_of(st.integers(0, END - 1), st.integers(FIRST, VOCAB - 1)), max_size=6),
    st.integers(0, 2**31),
    st.integers(0, 6),
)
def test_the_same_tokens_are_left_as_in_transformers(
    tokens: list[int], seed: int, num_before: int
) -> None:
    output = tuple(tokens)
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    processor = SpeechTokens(torch.device("cpu"))
    # Some of the tokens came before the request was retracted.
    processor.start(start(2, RULES, output[:num_before]))
    for token_id in output[num_before:]:
        processor.accept([2], [token_id])
    own = logits[None].clone()
    processor.apply(own, [2], [len(output)])
    assert torch.equal(own[0], expected(output, logits))


def test_other_rows_are_left_alone() -> None:
    processor = SpeechTokens(torch.device("cpu"))
    processor.start(start(0, None))
    processor.start(start(1, SpeechRules(end=END, suppressed=(3,))))
    logits = torch.zeros(2, VOCAB)
    processor.apply(logits, [0, 1], [1, 1])
    assert not logits[0].isinf().any()
    assert logits[1].isinf().nonzero().tolist() == [[3]]
    assert not processor.stateful_rows
    processor.start(start(1, RULES))
    assert processor.stateful_rows == {1}
    processor.start(start(1, None))
    assert not processor.stateful_rows


@pytest.mark.parametrize("rules", [RULES, SpeechRules(end=END)])
def test_its_token_ids_must_be_known(rules: SpeechRules) -> None:
    ids = dict(SamplingParams(speech=rules).token_ids())["speech"]
    assert END in ids
