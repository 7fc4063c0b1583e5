"""Plans on one rank with a real, tiny model: the engine's parts below the scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sapwood.app.building.resolving import resolve_config
from sapwood.app.building.wiring import build_engine
from sapwood.base.channel import CallbackSender, QueueChannel
from sapwood.executor.runner import Runner
from sapwood.executor.warmup import warm_up
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import RowStart, ScheduledTokens, StepPlan, StepResult
from tests.tiny import write_llama

PAGE = 4
GREEDY = SamplingParams(temperature=0.0)
PROMPT = [7, 30, 90, 200, 11, 45, 9, 100, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(params=["torch", "reference"])
def runner(model: Path, request: pytest.FixtureRequest) -> Iterator[Runner]:
    before = torch.get_num_threads()
    values = {
        "model": str(model),
        "load_format": "dummy",
        "dtype": "float32",
        "num_threads": 1,
        "page_size": PAGE,
        "max_total_tokens": 128,
        "max_running_requests": 4,
        "skip_server_warmup": True,
        "kernels": request.param,
    }
    resolved = resolve_config(EngineConfig.of(values), home=model)
    engine = build_engine(resolved, QueueChannel(), CallbackSender(lambda _: None))
    one = engine.executor._execute.__self__  # type: ignore[attr-defined]
    assert isinstance(one, Runner)
    yield one
    engine.executor.close()
    torch.set_num_threads(before)


def start(row: int, prompt: list[int], **more: object) -> RowStart:
    fields = {"sampling": GREEDY, "seed": 0, "output_ids": [], **more}
    options = RequestOptions(sampling=fields.pop("sampling"))  # type: ignore[arg-type]
    return RowStart(row=row, prompt_ids=prompt, options=options, **fields)  # type: ignore[arg-type]


def tokens(
    row: int, position: int, ids: list[int], pages: list[int], num_output: int | None
) -> ScheduledTokens:
    """`pages` begin at the page that holds `position`."""
    return ScheduledTokens(
        row=row,
        position=position,
        token_ids=ids,
        first_page=position // PAGE,
        pages=pages,
        num_output=num_output,
    )


def step(
    runner: Runner, scheduled: list[ScheduledTokens], starts: list[RowStart] | None = None
) -> StepResult:
    return runner.execute(StepPlan(step=5, starts=starts or [], scheduled=scheduled))


def sampled_in(result: StepResult) -> list[int]:
    return [token_id for brought in result.token_ids for token_id in brought]


def first_tokens(runner: Runner, count: int, row: int = 0, page: int = 0) -> list[int]:
    """A prompt at once, then decodes whose token only the rank knows."""
    table = list(range(page, page + 3))
    got = sampled_in(step(runner, [tokens(row, 0, PROMPT, table, 0)], [start(row, PROMPT)]))
    for index in range(1, count):
        position = len(PROMPT) + index - 1
        fresh = [page + position // PAGE] if position % PAGE == 0 else []
        got += sampled_in(step(runner, [tokens(row, position, [], fresh, index)]))
    return got


def test_a_result_is_of_its_step_and_has_a_token_per_sample(runner: Runner) -> None:
    plan = [tokens(0, 0, PROMPT, [0, 1, 2], 0), tokens(1, 0, PROMPT[:5], [3, 4], None)]
    result = step(runner, plan, [start(0, PROMPT), start(1, PROMPT)])
    assert result.step == 5
    assert len(sampled_in(result)) == 1
    assert sampled_in(step(runner, [tokens(1, 5, PROMPT[5:8], [4], None)])) == []


def test_chunks_give_the_token_of_the_whole(runner: Runner) -> None:
    expected = first_tokens(runner, 1)
    for size in (1, 2, 4, 5):
        starts: list[RowStart] | None = [start(1, PROMPT)]
        table = [10, 11, 12]
        for begin in range(0, len(PROMPT), size):
            ids = PROMPT[begin : begin + size]
            is_last = begin + size >= len(PROMPT)
            entry = ScheduledTokens(
                row=1,
                position=begin,
                token_ids=ids,
                first_page=0,
                pages=table,
                num_output=0 if is_last else None,
            )
            result = step(runner, [entry], starts)
            starts, table = None, []
        assert sampled_in(result) == expected


def test_tokens_on_their_way_are_known_to_the_rank(runner: Runner) -> None:
    """Decoding with ids left out equals feeding the ids back in."""
    expected = first_tokens(runner, 6)
    text = PROMPT + expected[:-1]
    again = step(runner, [tokens(2, 0, text, [20, 21, 22, 23], 5)], [start(2, PROMPT)])
    assert sampled_in(again) == expected[-1:]


def test_a_prefix_in_anothers_pages_is_read_where_it_lies(runner: Runner) -> None:
    expected = first_tokens(runner, 1)
    entry = ScheduledTokens(
        row=3, position=8, token_ids=PROMPT[8:], first_page=0, pages=[0, 1, 30], num_output=0
    )
    assert sampled_in(step(runner, [entry], [start(3, PROMPT)])) == expected


def test_a_mixed_step_gives_each_its_own(runner: Runner) -> None:
    expected = first_tokens(runner, 3)
    first_tokens(runner, 2, row=1, page=4)
    other = [99, 98, 97]
    alone = sampled_in(step(runner, [tokens(3, 0, other, [28], 0)], [start(3, other)]))
    plan = [
        tokens(1, len(PROMPT) + 1, [], [], 2),
        tokens(2, 0, PROMPT, [12, 13, 14], 0),
        tokens(3, 0, other, [20], 0),
    ]
    got = sampled_in(step(runner, plan, [start(2, PROMPT), start(3, other)]))
    assert got == [expected[2], expected[0], *alone]


def test_each_row_keeps_its_own_sampling(runner: Runner) -> None:
    [greedy] = first_tokens(runner, 1)
    never = SamplingParams(temperature=0.0, logit_bias={greedy: -100.0})
    seeded = SamplingParams(temperature=1.0)
    plan = [tokens(row, 0, PROMPT, [4 * row, 4 * row + 1, 4 * row + 2], 0) for row in range(4)]
    starts = [
        start(0, PROMPT),
        start(1, PROMPT, sampling=never),
        start(2, PROMPT, sampling=seeded, seed=11),
        start(3, PROMPT, sampling=seeded, seed=11),
    ]
    got = sampled_in(step(runner, plan, starts))
    assert got[0] == greedy
    assert got[1] != greedy
    assert got[2] == got[3]
    # A row's next request does not inherit anything.
    assert sampled_in(step(runner, [plan[1]], [start(1, PROMPT)])) == [greedy]


def test_a_retracted_request_brings_its_outputs_for_the_penalties(runner: Runner) -> None:
    sampling = SamplingParams(temperature=0.0, presence_penalty=2.0)
    table = [0, 1, 2]
    [first] = sampled_in(
        step(runner, [tokens(0, 0, PROMPT, table, 0)], [start(0, PROMPT, sampling=sampling)])
    )
    [second] = sampled_in(step(runner, [tokens(0, 9, [], [], 1)]))
    [third] = sampled_in(step(runner, [tokens(0, 10, [], [], 2)]))
    again = start(1, PROMPT, sampling=sampling, output_ids=[first, second])
    whole = tokens(1, 0, [*PROMPT, first, second], [8, 9, 10], 2)
    assert sampled_in(step(runner, [whole], [again])) == [third]


def test_a_warm_up_leaves_no_trace(runner: Runner) -> None:
    expected = first_tokens(runner, 4)
    warm_up(runner.execute)
    assert first_tokens(runner, 4) == expected
