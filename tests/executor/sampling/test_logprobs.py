from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sapwood.executor.sampling.logprobs import LogprobRecorder, by_entry
from sapwood.schema.logprobs import LEAST_LOGPROB, LogprobOptions
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import RowStart, ScheduledTokens

CPU = torch.device("cpu")
VOCAB, HIDDEN = 40, 8


def start(row: int, prompt: list[int], logprobs: LogprobOptions | None) -> RowStart:
    return RowStart(
        row=row,
        options=RequestOptions(sampling=SamplingParams(), logprobs=logprobs),
        seed=0,
        prompt_ids=prompt,
        output_ids=[],
    )


def entry(row: int, position: int, count: int, first: int, scored: int) -> ScheduledTokens:
    return ScheduledTokens(
        row=row,
        position=position,
        token_ids=[0] * count,
        first_page=0,
        pages=[],
        num_output=None,
        first_scored=first,
        num_scored=scored,
    )


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 3


def test_only_rows_that_want_some_are_looked_at() -> None:
    recorder = LogprobRecorder(CPU)
    logits = random(3, VOCAB)
    assert recorder.keep(logits, [0, 1, 2]) is None
    recorder.start(start(1, [1], LogprobOptions(num_top=3, token_ids=(5, 39))))
    kept = recorder.keep(logits, [0, 1, 2])
    assert kept is not None
    expected = logits.log_softmax(-1)[1]
    logits.zero_()  # as a processor might
    [(index, measured)] = recorder.of_output(kept, [0, 1, 2], torch.tensor([7, 8, 9])).items()
    assert index == 1
    found = measured.tell()
    assert found.of_tokens() == pytest.approx([float(expected[8])], abs=1e-5)
    [likeliest] = found.of_likeliest()
    values, ids = expected.topk(3)
    assert [one for _, one in likeliest] == ids.tolist()
    assert [value for value, _ in likeliest] == pytest.approx(values.tolist(), abs=1e-5)
    assert found.of_chosen()[0] == pytest.approx(expected[[5, 39]].tolist(), abs=1e-5)
    recorder.start(start(1, [1], None))
    assert recorder.keep(logits, [0, 1, 2]) is None


@pytest.mark.parametrize("rows_per_piece", [1, 2, 3, 100])
def test_a_prompt_is_scored_in_pieces(rows_per_piece: int) -> None:
    prompt = [int(one) for one in torch.randint(0, VOCAB, (9,))]
    recorder = LogprobRecorder(CPU, piece_bytes=4 * VOCAB * rows_per_piece)
    recorder.start(start(4, prompt, LogprobOptions(prompt_start=1, num_top=2)))
    hidden, weight = random(12, HIDDEN), random(HIDDEN, VOCAB)
    most = 0
    positions = []

    def logits_of(rows: Tensor, row: int, position: int) -> Tensor:
        nonlocal most
        assert row == 4
        positions.extend(range(position, position + len(rows)))
        most = max(most, len(rows))
        return rows @ weight

    # Another request's three tokens come first; then positions 0 .. 8 of the prompt.
    plan = [entry(0, 5, 3, 0, 0), entry(4, 0, 9, 1, 7)]
    assert recorder.scores(plan)
    found = recorder.of_prompts(plan, hidden, logits_of)
    assert list(found) == [1]
    assert positions == list(range(1, 8))
    assert most <= rows_per_piece
    expected = (hidden[3:] @ weight).log_softmax(-1)
    scored = found[1].tell()
    assert scored.of_tokens() == pytest.approx(
        [float(expected[p, prompt[p + 1]]) for p in range(1, 8)], abs=1e-4
    )
    assert [row[0][1] for row in scored.of_likeliest()] == expected[1:8].argmax(-1).tolist()


def test_steps_without_scored_tokens_are_not_scored() -> None:
    recorder = LogprobRecorder(CPU)
    recorder.start(start(4, [1, 2], LogprobOptions(prompt_start=0)))
    assert not recorder.scores([entry(4, 0, 2, 0, 0)])


def test_minus_infinity_is_a_number_that_json_has() -> None:
    recorder = LogprobRecorder(CPU)
    recorder.start(start(0, [1], LogprobOptions(token_ids=(3,))))
    logits = random(1, VOCAB)
    logits[0, 3] = -torch.inf
    kept = recorder.keep(logits, [0])
    assert kept is not None
    found = recorder.of_output(kept, [0], torch.tensor([3]))[0].tell()
    assert found.of_tokens() == (LEAST_LOGPROB,)
    assert found.of_chosen() == [[LEAST_LOGPROB]]


def test_both_kinds_meet_at_their_entry() -> None:
    recorder = LogprobRecorder(CPU)
    recorder.start(start(0, [1], LogprobOptions()))
    kept = recorder.keep(random(1, VOCAB), [0])
    assert kept is not None
    output = {0: recorder.of_output(kept, [0], torch.tensor([3]))[0].tell()}
    found = by_entry([2], output, {2: output[0], 5: output[0]})
    assert list(found) == [2, 5]
    assert found[2].output == found[2].prompt == output[0]
    assert found[5].output is None
