"""What single steps look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sapwood.base.clock import ManualClock
from sapwood.engine.request_state import RequestState
from sapwood.engine.scheduler import Scheduler
from sapwood.memory.eviction import EVICTION_POLICIES, EvictionKey, least_recently_used
from sapwood.memory.ledger import Ledger
from sapwood.memory.prefix_tree import PrefixTree
from sapwood.schema.config.scheduler import SchedulerConfig
from sapwood.schema.logprobs import LogprobOptions
from sapwood.schema.output import RequestOutput
from sapwood.schema.request import Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams
from tests.engine.simulation import SimulatedRank, expected_outputs

PAGE = 4


class Engine:
    def __init__(
        self,
        *,
        num_pages: int = 64,
        context_length: int = 200,
        eos: set[int] | None = None,
        eviction_key: Callable[[int, int], EvictionKey] = least_recently_used,
        **config: object,
    ) -> None:
        settings = {
            "max_running_requests": 8,
            "max_queued_requests": 8,
            "chunked_prefill_size": 64,
            "overlap_depth": 1,
            **config,
        }
        self.tree = PrefixTree(PAGE, eviction_key)
        self.ledger = Ledger(num_pages=num_pages, page_size=PAGE, tree=self.tree)
        self.clock = ManualClock()
        self.scheduler = Scheduler(
            SchedulerConfig(**settings),
            self.ledger,
            context_length=context_length,
            vocab_size=100,
            eos_token_ids=eos or set(),
            clock=self.clock,
        )
        self.rank = SimulatedRank(num_pages, PAGE)
        self.outputs: dict[str, list[RequestOutput]] = {}

    def add(
        self,
        request_id: str,
        prompt: list[int],
        *,
        logprobs: LogprobOptions | None = None,
        **sampling: object,
    ) -> RequestOutput | None:
        params = SamplingParams(**{"max_new_tokens": 4, "temperature": 0.0, **sampling})
        return self.scheduler.add(
            Generate(
                request_id=request_id,
                prompt_ids=prompt,
                options=RequestOptions(sampling=params, logprobs=logprobs),
            )
        )

    def step(self) -> list[int]:
        """Tokens computed for each scheduled request."""
        plan = self.scheduler.plan()
        if plan is None:
            return []
        for output in self.scheduler.update(plan, self.rank.execute(plan)):
            self.outputs.setdefault(output.request_id, []).append(output)
        return [entry.num_new for entry in plan.scheduled]

    def run(self) -> None:
        while self.scheduler.has_open_requests:
            self.step()

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]


def test_a_long_prompt_comes_in_chunks_beside_decodes() -> None:
    engine = Engine(chunked_prefill_size=10)
    engine.add("a", [1, 2, 3])
    assert engine.step() == [3]
    engine.add("b", list(range(20)))
    assert engine.step() == [1, 9]
    assert engine.step() == [1, 9]
    assert engine.step() == [1, 2]
    engine.run()
    assert engine.tokens("b") == expected_outputs(list(range(20)), 4, set())


def test_prompts_take_no_more_of_a_step_than_their_share() -> None:
    engine = Engine(max_prefill_tokens=8, chunked_prefill_size=64)
    engine.add("a", [1, 2, 3])
    engine.add("b", [4, 5, 6])
    engine.add("c", list(range(20)))
    assert engine.step() == [3, 3, 2]
    assert engine.step() == [1, 1, 8]
    assert engine.step() == [1, 1, 8]
    engine.run()
    assert engine.tokens("c") == expected_outputs(list(range(20)), 4, set())


def test_a_step_computes_the_prompts_of_so_many_requests() -> None:
    engine = Engine(prefill_max_requests=2)
    for name, first in (("a", 1), ("b", 2), ("c", 3)):
        engine.add(name, [first] * 5, max_new_tokens=2)
    assert engine.step() == [5, 5]
    assert engine.step() == [1, 1, 5]
    engine.run()


def test_one_prefix_of_many_waiting_requests_is_computed_once() -> None:
    engine = Engine(num_pages=128)
    prefix = [index % 7 for index in range(60)]
    for index in range(8):
        engine.add(f"r{index}", [*prefix, 20 + index, 30 + index], max_new_tokens=2)
    assert engine.step() == [62]
    assert sorted(engine.step()) == [1] + [2] * 7
    engine.run()
    status = engine.scheduler.status()
    assert status.num_cached_tokens == 7 * 60
    assert engine.outputs["r3"][-1].num_cached_tokens == 60
    assert engine.outputs["r0"][-1].num_cached_tokens == 0


def test_requests_of_another_namespace_do_not_wait() -> None:
    engine = Engine(num_pages=128, chunked_prefill_size=-1)
    prefix = [index % 7 for index in range(60)]
    for key in ("x", "y"):
        engine.scheduler.add(
            Generate(
                request_id=key,
                prompt_ids=prefix,
                options=RequestOptions(
                    sampling=SamplingParams(max_new_tokens=1, temperature=0.0), namespace=key
                ),
            )
        )
    assert engine.step() == [60, 60]


def test_while_a_prompt_is_in_progress_decodes_do_not_walk_their_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(num_pages=256, chunked_prefill_size=16)
    for index in range(6):
        engine.add(f"r{index}", [index] * 8, max_new_tokens=100)
    while engine.step() != [1] * 6:
        pass
    engine.add("long", list(range(99)), max_new_tokens=1)
    engine.step()
    walked: list[str] = []
    page_hashes = RequestState.page_hashes

    def noted(self: RequestState, page_size: int) -> list[int]:
        walked.append(self.request_id)
        return page_hashes(self, page_size)

    monkeypatch.setattr(RequestState, "page_hashes", noted)
    num_steps = 0
    while "long" not in engine.outputs:
        assert engine.step()[:6] == [1] * 6
        num_steps += 1
    assert num_steps > 5
    assert walked == ["long"], "it withdraws what it had announced, once"


def test_a_request_does_not_wait_for_a_prefix_that_it_may_not_use() -> None:
    """Log probabilities are wanted from its third page on, and a hit brings none."""
    prompt = list(range(60))
    for start, first_step in ((8, [60, 60]), (52, [60])):
        engine = Engine(num_pages=128, chunked_prefill_size=-1)
        engine.add("plain", prompt)
        engine.add("scored", prompt, logprobs=LogprobOptions(prompt_start=start))
        assert engine.step() == first_step
        engine.run()
        assert engine.tokens("scored") == expected_outputs(prompt, 4, set())


@pytest.mark.parametrize("policy", sorted(EVICTION_POLICIES))
def test_a_request_that_comes_again_and_again_costs_the_same_each_time(policy: str) -> None:
    num_keys = 0

    def counted(num_hits: int, last_used: int) -> EvictionKey:
        nonlocal num_keys
        num_keys += 1
        return EVICTION_POLICIES[policy](num_hits, last_used)

    engine = Engine(eviction_key=counted)
    most = 0
    for index in range(400):
        before = num_keys
        engine.add(f"r{index}", list(range(20)), max_new_tokens=2)
        engine.run()
        most = max(most, num_keys - before)
    assert most <= 2
    assert len(engine.tree._leaves) <= len(list(engine.tree.nodes()))


def test_a_request_that_is_not_admitted_does_not_count_as_a_hit() -> None:
    engine = Engine(num_pages=16, eviction_key=EVICTION_POLICIES["lfu"])
    engine.add("known", list(range(8)), max_new_tokens=1)
    engine.run()
    engine.add("large", list(range(20, 60)), max_new_tokens=8)
    engine.step()
    engine.add("waits", [*range(8), *range(60, 80)], max_new_tokens=1)
    hits = [node.num_hits for node in engine.tree.nodes()]
    for _ in range(5):
        assert engine.step() == [1], "no room for another one"
    assert [node.num_hits for node in engine.tree.nodes()] == hits
    engine.run()
    assert sum(node.num_hits for node in engine.tree.nodes()) == sum(hits) + 1


def test_retraction_loses_no_output() -> None:
    engine = Engine(num_pages=12, schedule_conservativeness=0.0)
    for index in range(4):
        engine.add(f"r{index}", [index] * 5, max_new_tokens=24)
    engine.run()
    assert engine.scheduler.status().num_retractions > 0
    for index in range(4):
        assert engine.tokens(f"r{index}") == expected_outputs([index] * 5, 24, set())


def test_the_queue_limit_refuses_with_503() -> None:
    engine = Engine(max_running_requests=1, max_queued_requests=2)
    assert engine.add("a", [1]) is None
    engine.step()
    assert engine.add("b", [1]) is None
    assert engine.add("c", [1]) is None
    refused = engine.add("d", [1])
    assert refused is not None
    assert refused.finish is not None
    assert (refused.finish.status, refused.finish.message) == (503, "The request queue is full.")
    engine.run()
    assert engine.scheduler.status().num_refused == 1


@pytest.mark.parametrize(("prompt", "message"), [([], "empty"), ([1] * 300, "at most 199")])
def test_impossible_prompts_are_refused(prompt: list[int], message: str) -> None:
    refused = Engine().add("a", prompt)
    assert refused is not None
    assert refused.finish is not None
    assert refused.finish.status == 400
    assert message in (refused.finish.message or "")


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([5, 100], {}),
        ([-1], {}),
        ([1], {"stop_token_ids": (100,)}),
        ([1], {"logit_bias": {100: 1.0}}),
        (
            [1],
            {
                "custom_logit_processor": "disallowed_tokens",
                "custom_params": {"token_ids": [3, 100]},
            },
        ),
        ([1], {"logprobs": LogprobOptions(token_ids=(100,))}),
    ],
)
def test_tokens_outside_the_vocabulary_never_reach_the_model(
    prompt: list[int], options: dict[str, Any]
) -> None:
    refused = Engine().add("a", prompt, **options)
    assert refused is not None
    assert refused.finish is not None
    assert refused.finish.status == 400
    assert "outside the model's vocabulary, 0 to 99" in (refused.finish.message or "")


def test_output_ends_where_the_context_ends() -> None:
    engine = Engine(num_pages=8)
    engine.add("a", [1] * 30, max_new_tokens=None)
    engine.run()
    assert len(engine.tokens("a")) == 2
    finish = engine.outputs["a"][-1].finish
    assert finish is not None
    assert finish.kind == "length"


def test_eos_and_stop_tokens_end_a_request_unless_told_otherwise() -> None:
    prompt = [3, 1]
    free = expected_outputs(prompt, 8, set())
    stop = free[2]
    end = free.index(stop) + 1
    for eos, options in (({stop}, {}), (set(), {"stop_token_ids": (stop,)})):
        engine = Engine(eos=eos)
        engine.add("a", prompt, max_new_tokens=8, **options)
        engine.run()
        assert engine.tokens("a") == free[:end]
        finish = engine.outputs["a"][-1].finish
        assert finish is not None
        assert (finish.kind, finish.matched) == ("stop", stop)
    engine = Engine(eos={stop})
    engine.add("a", prompt, max_new_tokens=8, ignore_eos=True)
    engine.run()
    assert engine.tokens("a") == free


def test_abort_in_every_state_ends_with_one_output() -> None:
    engine = Engine(max_running_requests=1, chunked_prefill_size=4)
    engine.add("running", [1] * 10)
    engine.add("waiting", [2] * 10)
    engine.step()
    for request_id in ("waiting", "running"):
        output = engine.scheduler.abort(request_id)
        assert output is not None
        assert output.finish is not None
        assert output.finish.kind == "abort"
        assert engine.scheduler.abort(request_id) is None
    assert not engine.scheduler.has_open_requests
    assert engine.scheduler.status().num_leased_pages == 0


def test_flushing_waits_for_open_requests() -> None:
    engine = Engine()
    engine.add("a", [1] * 20)
    assert not engine.scheduler.flush_cache()
    engine.run()
    assert engine.scheduler.status().num_cached_pages > 0
    assert engine.scheduler.flush_cache()
    assert engine.scheduler.status().num_free_pages == 64


def test_queue_time_is_from_arrival_to_the_first_step() -> None:
    engine = Engine(max_running_requests=1)
    engine.add("a", [1])
    engine.clock.advance(1.5)
    engine.run()
    assert engine.outputs["a"][-1].queue_time_s == 1.5


def test_a_request_with_a_slow_grammar_pauses_and_others_go_on() -> None:
    engine = Engine()
    engine.add("slow", [1, 2, 3], max_new_tokens=3)
    engine.rank.pause_s = 2.0
    assert engine.step() == [3]
    engine.rank.pause_s = 0.0
    engine.add("quick", [4, 5, 6, 7], max_new_tokens=4)
    assert [engine.step() for _ in range(4)] == [[4], [1], [1], [1]]
    assert engine.step() == []
    assert not engine.scheduler.has_work, "nobody needs to ask again at once"
    assert engine.scheduler.has_open_requests
    engine.clock.advance(1.9)
    assert engine.step() == []
    engine.clock.advance(0.2)
    assert [engine.step() for _ in range(2)] == [[1], [1]]
    assert engine.scheduler.open_request_ids == []
    assert not engine.scheduler.has_work


def test_a_result_says_how_long_a_request_pauses() -> None:
    engine = Engine()
    engine.rank.pause_s = 2.0
    engine.add("slow", [1, 2, 3, 4], max_new_tokens=2)
    assert engine.step() == [4]
    assert engine.step() == []
    engine.clock.advance(2.1)
    assert engine.step() == [1]
    assert engine.scheduler.open_request_ids == []
