"""A long prompt beside requests that decode (review 2, number 7)."""

from __future__ import annotations

import pytest

from sapwood.engine.step_time import FIRST_TOKENS, TILE
from tests.engine.test_scheduler import Engine


def slow_engine(**config: object) -> Engine:
    return Engine(num_pages=2048, context_length=8000, chunked_prefill_size=1024, **config)


def timed_steps(engine: Engine, count: int, *, token_s: float) -> list[tuple[list[int], float]]:
    """(new tokens of each request, seconds) of so many steps, which cost that much per token."""
    found = []
    for _ in range(count):
        plan = engine.scheduler.plan()
        assert plan is not None
        shares = [entry.num_new for entry in plan.scheduled]
        seconds = token_s * sum(shares)
        engine.clock.advance(seconds)
        for output in engine.scheduler.update(plan, engine.rank.execute(plan)):
            engine.outputs.setdefault(output.request_id, []).append(output)
        found.append((shares, seconds))
    return found


@pytest.mark.parametrize(("token_s", "most_tokens"), [(0.002, 125), (0.0001, 1024), (0.01, TILE)])
def test_a_prompt_takes_what_the_time_allows_beside_a_decode(token_s, most_tokens):
    engine = slow_engine()
    engine.add("talks", [1] * 20, max_new_tokens=100)
    timed_steps(engine, 3, token_s=token_s)
    engine.add("reads", [index % 7 for index in range(5000)])
    (first, _), *later = timed_steps(engine, 8, token_s=token_s)
    assert first == [1, FIRST_TOKENS]
    for shares, seconds in later:
        assert shares[0] == 1
        assert shares[1] <= most_tokens
        assert seconds <= 0.25 or shares[1] == TILE
    assert sum(shares[1] for shares, _ in later) > 7 * (most_tokens - TILE - 1) // 2


def test_alone_a_prompt_takes_whole_chunks():
    engine = slow_engine()
    engine.add("reads", [index % 7 for index in range(3000)])
    assert [shares for shares, _ in timed_steps(engine, 3, token_s=0.002)] == [
        [1024],
        [1024],
        [952],
    ]


def test_without_a_target_the_number_of_tokens_alone_counts():
    engine = slow_engine(max_step_time_ms=0.0)
    engine.add("talks", [1] * 20, max_new_tokens=100)
    timed_steps(engine, 3, token_s=0.002)
    engine.add("reads", [index % 7 for index in range(3000)])
    assert [shares for shares, _ in timed_steps(engine, 2, token_s=0.002)] == [[1, 1023]] * 2


def test_no_answer_depends_on_the_time():
    outputs = []
    for token_s in (0.0001, 0.002, 0.02):
        engine = slow_engine()
        engine.add("talks", [1] * 20, max_new_tokens=60)
        timed_steps(engine, 2, token_s=token_s)
        engine.add("reads", [index % 7 for index in range(2000)], max_new_tokens=8)
        while engine.scheduler.has_work:
            timed_steps(engine, 1, token_s=token_s)
        outputs.append([engine.tokens(name) for name in ("talks", "reads")])
    assert outputs[0] == outputs[1] == outputs[2]
