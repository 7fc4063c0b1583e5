from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from sapwood.executor.rows import RowTable
from sapwood.executor.sampling.processors import AllowedTokens, LogitBias, MinNewTokens, Penalties
from sapwood.executor.sampling.sampler import Sampler
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.registry import Need
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.kernels.torch_ops.sampling import NUM_CANDIDATES
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import RowStart

CPU = torch.device("cpu")
VOCAB = 1000
KERNELS: list[Kernels] = []
"""The one that the running test draws with."""


@pytest.fixture(autouse=True, params=[ReferenceKernels, TorchKernels, CpuKernels])
def _draw_with(request: pytest.FixtureRequest) -> Iterator[None]:
    need = Need(device="cpu", dtype=torch.float32, head_dim=32, page_size=1)
    reason = request.param.why_not(need)
    if reason is not None:
        pytest.skip(f"{request.param.name} cannot run here: {reason}")
    KERNELS[:] = [request.param()]
    yield
    KERNELS.clear()


def make_sampler(params: list[SamplingParams], *, seed: int = 0, eos: set[int] | None = None):
    rows = RowTable(num_rows=len(params), max_pages=1, device=CPU)
    processors = [
        LogitBias(CPU),
        Penalties(CPU, KERNELS[0]),
        MinNewTokens(eos or set(), CPU),
        AllowedTokens(CPU),
    ]
    sampler = Sampler(rows, processors, KERNELS[0])
    for row, one in enumerate(params):
        start = RowStart(
            row=row,
            options=RequestOptions(sampling=one),
            seed=one.seed if one.seed is not None else seed + row,
            prompt_ids=[1, 2, 3],
            output_ids=[],
        )
        rows.start(start)
        sampler.start(start)
    return sampler


def sample_next(sampler: Sampler, logits: torch.Tensor, position: int) -> int:
    """The token that row 0 puts out at that position, which is accepted."""
    token_id = int(sampler.sample(logits.clone()[None], [0], [position])[0])
    sampler.accept([0], [token_id])
    return token_id


def draw(params: SamplingParams, logits: torch.Tensor, count: int = 400) -> Counter[int]:
    """Tokens that one request would draw at its positions 0 .. count - 1."""
    sampler = make_sampler([params])
    return Counter(sample_next(sampler, logits, position) for position in range(count))


def ranked_logits() -> torch.Tensor:
    """Probabilities 0.5, 0.25, 0.125, … of tokens 0, 1, 2, …"""
    return -torch.arange(VOCAB, dtype=torch.float32) * 0.6931471805599453


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(temperature=0.0), SamplingParams(top_k=1)] * 2
    chosen = make_sampler(params).sample(logits.clone(), [0, 1, 2, 3], [0] * 4)
    assert chosen.tolist() == logits.argmax(-1).tolist()


def test_frequencies_follow_the_probabilities() -> None:
    counts = draw(SamplingParams(seed=5), ranked_logits(), count=4000)
    for token, probability in enumerate((0.5, 0.25, 0.125)):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_temperature_flattens() -> None:
    counts = draw(SamplingParams(seed=5, temperature=2.0), ranked_logits(), count=2000)
    weights = [2 ** (-token / 2) for token in range(VOCAB)]
    assert counts[0] / 2000 == pytest.approx(weights[0] / sum(weights), abs=0.04)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_p": 0.7}, {0, 1}),
        ({"top_p": 0.74}, {0, 1}),
        ({"top_p": 0.76}, {0, 1, 2}),
        ({"min_p": 0.2}, {0, 1, 2}),
        ({"top_k": 2, "top_p": 0.6}, {0}),
        ({"top_k": 2, "top_p": 0.7}, {0, 1}),
        ({"top_p": 0.9, "min_p": 0.4}, {0, 1}),
        ({"top_k": 500, "top_p": 0.76}, {0, 1, 2}),
    ],
)
def test_filters_keep_what_they_should(params: dict[str, float], kept: set[int]) -> None:
    assert set(draw(SamplingParams(seed=1, **params), ranked_logits())) == kept


def test_a_flat_distribution_looks_at_the_whole_vocabulary() -> None:
    assert VOCAB > NUM_CANDIDATES
    counts = draw(SamplingParams(seed=1, top_p=0.9), torch.zeros(VOCAB), count=3000)
    assert len(counts) > 2 * NUM_CANDIDATES
    assert len(counts) <= 0.9 * VOCAB


def test_the_same_seed_draws_the_same_whatever_else_is_in_the_batch() -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0))
    mine = SamplingParams(seed=42, top_p=0.95)
    others = [
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=5),
        SamplingParams(min_p=0.1),
        SamplingParams(),
    ]
    alone = make_sampler([mine])
    together = make_sampler([others[0], others[1], mine, others[2], others[3]])
    for position in range(30):
        one = alone.sample(logits[2:3].clone(), [0], [position])
        many = together.sample(logits.clone(), [0, 1, 2, 3, 4], [7, 3, position, 0, 1])
        assert int(one[0]) == int(many[2])


def test_different_seeds_draw_differently() -> None:
    logits = torch.zeros(VOCAB)
    assert draw(SamplingParams(seed=1), logits, 50) != draw(SamplingParams(seed=2), logits, 50)


def test_logit_bias() -> None:
    params = SamplingParams(temperature=0.0, logit_bias={7: 100.0})
    assert set(draw(params, ranked_logits(), 3)) == {7}


def test_min_new_tokens_forbids_the_end_until_then() -> None:
    params = SamplingParams(temperature=0.0, min_new_tokens=2, stop_token_ids=(1,))
    sampler = make_sampler([params], eos={0})
    tokens = [sample_next(sampler, ranked_logits(), position) for position in range(3)]
    assert tokens == [2, 2, 0]


def test_only_allowed_tokens_come_and_only_where_they_are_asked_for() -> None:
    allowed = SamplingParams(temperature=1.0, allowed_token_ids=(7, 20, 7))
    sampler = make_sampler([allowed, SamplingParams(temperature=0.0)])
    logits = ranked_logits().repeat(2, 1)
    seen = {tuple(sampler.sample(logits.clone(), [0, 1], [i, i]).tolist()) for i in range(50)}
    assert {first for first, _ in seen} <= {7, 20}
    assert {second for _, second in seen} == {int(ranked_logits().argmax())}
    biased = make_sampler(
        [SamplingParams(temperature=0.0, allowed_token_ids=(7, 20), logit_bias={20: 100.0})]
    )
    assert sample_next(biased, ranked_logits(), 0) == 20


def test_allowed_tokens_that_would_end_the_output_too_early_come_all_the_same() -> None:
    params = SamplingParams(temperature=0.0, min_new_tokens=1, allowed_token_ids=(0, 1))
    assert sample_next(make_sampler([params], eos={0, 1}), ranked_logits(), 0) in (0, 1)
    params = SamplingParams(temperature=0.0, min_new_tokens=1, allowed_token_ids=(0, 9))
    sampler = make_sampler([params], eos={0})
    assert [sample_next(sampler, ranked_logits(), i) for i in (0, 1)] == [9, 0]


def test_repetition_penalty_looks_at_prompt_and_output() -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0, max_new_tokens=3)
    sampler = make_sampler([params])
    logits = torch.full((1, VOCAB), -10.0)
    logits[0, [1, 50, 51]] = torch.tensor([9.0, 6.0, 5.0])
    tokens = [sample_next(sampler, logits[0], position) for position in range(3)]
    assert tokens == [50, 51, 1]


def test_frequency_and_presence_penalties_look_at_the_output() -> None:
    logits = torch.full((1, VOCAB), -10.0)
    logits[0, [1, 50]] = torch.tensor([2.0, 1.1])
    frequent = make_sampler([SamplingParams(temperature=0.0, frequency_penalty=0.5)])
    tokens = [sample_next(frequent, logits[0], p) for p in range(5)]
    assert tokens == [1, 1, 50, 1, 50]
    present = make_sampler([SamplingParams(temperature=0.0, presence_penalty=1.0)])
    tokens = [sample_next(present, logits[0], p) for p in range(4)]
    assert tokens == [1, 50, 1, 1]


def test_a_row_forgets_the_request_before() -> None:
    sampler = make_sampler([SamplingParams(temperature=0.0, logit_bias={7: 100.0})])
    start = RowStart(
        row=0,
        options=RequestOptions(sampling=SamplingParams(temperature=0.0)),
        seed=0,
        prompt_ids=[1],
        output_ids=[],
    )
    sampler.start(start)
    assert int(sampler.sample(ranked_logits()[None], [0], [0])[0]) == 0


def test_penalties_look_no_farther_back_than_their_window() -> None:
    logits = torch.zeros(VOCAB)
    logits[[1, 2, 3, 4]] = torch.tensor([4.0, 3.9, 3.8, 3.7])
    # The prompt is 1, 2, 3: with a window of 2 token 1 is already free.
    window = SamplingParams(temperature=0.0, repetition_penalty=2.0, penalty_window=2)
    sampler = make_sampler([window])
    assert [sample_next(sampler, logits, i) for i in range(6)] == [1, 2, 3, 1, 2, 3]
    none = make_sampler([SamplingParams(temperature=0.0, repetition_penalty=2.0, penalty_window=0)])
    assert [sample_next(none, logits, i) for i in range(3)] == [1, 1, 1]
    wide = {"temperature": 0.0, "repetition_penalty": 2.0, "frequency_penalty": 0.7}
    bounded = make_sampler([SamplingParams(**wide, penalty_window=1000)])
    endless = make_sampler([SamplingParams(**wide)])
    for position in range(12):
        assert sample_next(bounded, logits, position) == sample_next(endless, logits, position)


@pytest.mark.parametrize("window", [1, 2, 5, 60, 200])
def test_a_window_of_penalties_is_that_of_its_last_tokens(window: int) -> None:
    """Against penalties over all tokens of a request that begins with the window."""
    generator = torch.Generator().manual_seed(window)
    prompt = torch.randint(0, 40, (300,), generator=generator).tolist()
    output = torch.randint(0, 40, (150,), generator=generator).tolist()
    penalties = {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": 0.25}
    told = Penalties(CPU, KERNELS[0])
    told.start(_start(SamplingParams(**penalties, penalty_window=window), prompt, output[:3]))
    for num_output in range(3, len(output)):
        wanted = torch.randn(VOCAB, generator=generator)
        got = wanted.clone()
        told.apply(got[None], [0], [num_output])
        start = max(0, num_output - window)
        num_prompt = max(0, window - num_output)
        whole = Penalties(CPU, KERNELS[0])
        last = prompt[len(prompt) - num_prompt :]
        whole.start(_start(SamplingParams(**penalties), last, output[start:num_output]))
        whole.apply(wanted[None], [0], [num_output])
        torch.testing.assert_close(got, wanted)
        told.accept([0], [output[num_output]])


def _start(sampling: SamplingParams, prompt: list[int], output: list[int]) -> RowStart:
    return RowStart(
        row=0,
        options=RequestOptions(sampling=sampling),
        seed=0,
        prompt_ids=prompt,
        output_ids=output,
    )
