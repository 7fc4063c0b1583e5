"""Whatever arrives, is aborted, retracted or evicted: one owner per page, the same outputs.

The same for models that keep every token, windows, states, or several of these.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from sapwood.base.clock import ManualClock
from sapwood.engine.adapters import AdapterSlots
from sapwood.engine.request_state import adapter_in
from sapwood.engine.scheduler import Scheduler
from sapwood.engine.shared_names import SharedNames
from sapwood.engine.speculation import Speculation
from sapwood.engine.stored_pages import StoredPages
from sapwood.engine.tiers import CacheTiers
from sapwood.memory.eviction import EVICTION_POLICIES
from sapwood.memory.kv_events import KVEventSource
from sapwood.memory.ledger import Ledger
from sapwood.memory.listener import Listeners
from sapwood.memory.prefix_tree import PrefixTree
from sapwood.memory.storage.names import CopyNames
from sapwood.memory.tiers.host import HostTier
from sapwood.memory.tiers.rates import CostRule, Rate
from sapwood.schema.cache import (
    FULL_POOL,
    CacheGroup,
    CacheKind,
    CachePool,
    CacheTensor,
    keys_and_values,
    latent_rows,
    pages_of_window,
    pools_of,
)
from sapwood.schema.config.scheduler import POLICIES, SchedulerConfig
from sapwood.schema.config.tiers import PrefetchPolicy, PrefetchRules, WritePolicy
from sapwood.schema.output import Finish, RequestOutput
from sapwood.schema.request import Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import TokenFeed
from sapwood.speculative.costs import StepCosts
from tests.engine.simulated_storage import ScriptedWorker, SimulatedParts
from tests.engine.simulation import (
    DelayedExecutor,
    SimulatedRank,
    SometimesRight,
    expected_outputs,
)
from tests.memory.event_follower import EventFollower
from tests.memory.mirror import Mirror
from tests.tiers import examples

EOS = {7}
MAX_CONTEXT = 60
ADAPTERS = {"small": 1, "middle": 2, "large": 4, "other": 1}
"""Bytes of each."""


STATE_POOL = CachePool(CacheKind.STATE, (0,))


def window_pool(window: int) -> CachePool:
    return CachePool(CacheKind.WINDOW, (0,), window)


@st.composite
def pools_with_sizes(draw: st.DrawFn, page_size: int, chunk: int) -> list[tuple[CachePool, int]]:
    """Other pools than the one of every token; each has what a single request needs, or more."""
    step = MAX_CONTEXT if chunk == -1 else chunk
    pools = []
    for window in sorted(draw(st.sets(st.integers(1, 40), max_size=2))):
        least = pages_of_window(window, step, page_size)
        pools.append((window_pool(window), least + draw(st.integers(0, 12))))
    if draw(st.booleans()):
        pools.append((STATE_POOL, draw(st.integers(1, 8))))
    return pools


@st.composite
def pools_of_groups(draw: st.DrawFn, page_size: int, chunk: int) -> list[tuple[CachePool, int]]:
    """The pools of a model with latent rows, windows and states, and perhaps keys and values too:
    those that keep every token share page numbers, and so do windows of one length."""
    step = MAX_CONTEXT if chunk == -1 else chunk
    windows = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    groups = [
        latent_rows((0,), width=8, index_width=draw(st.sampled_from([0, 4]))),
        CacheGroup(kind=CacheKind.STATE, layers=(1,), tensors={"state": CacheTensor((2, 3))}),
        *(
            keys_and_values((2 + index,), num_kv_heads=1 + index, head_dim=4, window=window)
            for index, window in enumerate(windows)
        ),
    ]
    if draw(st.booleans()):
        groups.append(keys_and_values((9,), num_kv_heads=1, head_dim=4))
    groups = draw(st.permutations(groups))
    pools = pools_of(groups)
    assert sorted(index for pool in pools for index in pool.groups) == list(range(len(groups)))
    assert [pool.window for pool in pools] == [None, *sorted(set(windows)), None]
    sizes = {
        CacheKind.FULL: -(-draw(st.integers(30, 150)) // page_size),
        CacheKind.STATE: draw(st.integers(1, 8)),
    }
    return [
        (pool, sizes[pool.kind])
        if pool.window is None
        else (pool, pages_of_window(pool.window, step, page_size) + draw(st.integers(0, 12)))
        for pool in pools
    ]


@st.composite
def scenarios(
    draw: st.DrawFn, *, is_plain: bool = False, has_groups: bool = False
) -> dict[str, object]:
    page_size = draw(st.sampled_from([1, 2, 4, 8]))
    shared = [draw(st.lists(st.integers(0, 20), min_size=0, max_size=30)) for _ in range(3)]
    requests = [
        {
            "prompt": draw(st.sampled_from(shared))
            + draw(st.lists(st.integers(0, 20), min_size=1, max_size=12)),
            "max_new": draw(st.integers(0, 12)),
            "extra_key": draw(st.sampled_from(["", "", "tenant"])),
            "priority": draw(st.sampled_from([None, 0, 1, 5])),
            "routing_key": draw(st.sampled_from(["", "a", "b"])),
            "adapter": draw(st.sampled_from(["", "", *ADAPTERS])),
            "arrives": draw(st.integers(0, 25)),
            "aborted": draw(st.none() | st.integers(0, 40)),
        }
        for _ in range(draw(st.integers(1, 14)))
    ]
    chunk = draw(st.sampled_from([1, 3, 16, 64, -1]))
    if has_groups:
        pools = draw(pools_of_groups(page_size, chunk))
    else:
        full = (FULL_POOL, -(-draw(st.integers(30, 150)) // page_size))
        others = [] if is_plain else draw(pools_with_sizes(page_size, chunk))
        pools = [full, *others] if not others or draw(st.booleans()) else others
    return {
        "page_size": page_size,
        "pools": pools,
        "state_interval": page_size * draw(st.integers(1, 5)),
        "policy": draw(st.sampled_from(POLICIES)),
        "eviction": draw(st.sampled_from(sorted(EVICTION_POLICIES))),
        "prefixes": draw(st.sampled_from([True, True, True, False])),
        "chunk": chunk,
        "max_running": draw(st.integers(1, 8)),
        "conservativeness": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "threshold": draw(st.sampled_from([-1, 1, 8, 32])),
        "depth": draw(st.sampled_from([1, 2, 3])),
        "preemption": draw(st.sampled_from([0, 1, 10])),
        "low_first": draw(st.booleans()),
        "aging": draw(st.sampled_from([0.0, 1.0, 5.0])),
        "pause_s": draw(st.sampled_from([0.0, 0.0, 0.7, 3.0])),
        "delayer": draw(st.booleans()),
        "prefill_tokens": draw(st.none() | st.integers(1, 40)),
        "prefill_requests": draw(st.none() | st.integers(1, 3)),
        "feed": draw(st.sampled_from([TokenFeed.ROW, TokenFeed.ROW, TokenFeed.SCHEDULER])),
        "stages": draw(st.integers(1, 3)),  # of an engine whose scheduler feeds tokens
        "most_decodes": draw(st.none() | st.integers(1, 4)),
        "drafts": draw(st.sampled_from([0, 0, 1, 3, 8])),  # of a step at most
        "by_rank": draw(st.booleans()),
        "step_tokens": draw(st.sampled_from([2, 6, 32])),
        "adapts": draw(st.booleans()),
        "requests": requests,
        "adapters_at_once": draw(st.integers(1, 3)),
        "adapter_bytes": draw(st.integers(max(ADAPTERS.values()), 8)),
        "host_sizes": draw(
            st.just([]) | st.tuples(st.integers(1, 60), st.integers(1, 20)).map(list)
        ),
        "write_policy": draw(st.sampled_from(WritePolicy)),
        "storage": draw(st.none() | st.integers(0, 1 << 30)),
        "adapter_policy": draw(st.sampled_from(["lru", "fifo"])),
    }


class World:
    """A scheduler, its ledger and a simulated rank, driven turn by turn."""

    def __init__(
        self, scenario: dict[str, object], kept: dict[str, list[object]] | None = None
    ) -> None:
        """kept: what a storage has; None: as much as nothing"""
        self.kept = {} if kept is None else kept
        page_size = scenario["page_size"]
        pools = [pool for pool, _ in scenario["pools"]]
        self.sizes = [size for _, size in scenario["pools"]]
        key = EVICTION_POLICIES[scenario["eviction"]]
        self.mirror = Mirror(page_size)
        self.follower = EventFollower(page_size)
        kinds = [pool.kind for pool in pools]
        self.has_events = CacheKind.FULL in kinds
        heard = [self.mirror]
        events = None
        if self.has_events:
            full = kinds.index(CacheKind.FULL)
            name_of = partial(adapter_in, has_lengths=False)
            events = KVEventSource(self.follower.take, full, name_of)
            heard.append(events)
        self.host = None
        if scenario["host_sizes"] and scenario["prefixes"]:
            sizes = [scenario["host_sizes"][0], *scenario["host_sizes"][1:] * len(pools)]
            self.host = HostTier(sizes[: len(pools)], scenario["write_policy"])
            heard.append(self.host)
            if events is not None:
                self.host.listeners.append(events)
        host_sizes = [] if self.host is None else [one.num_slots for one in self.host.slots]
        listener = Listeners(*heard)
        self.tree = PrefixTree(page_size, key, pools, listener) if scenario["prefixes"] else None
        self.clock = ManualClock()
        self.ledger = Ledger(
            num_pages=self.sizes,
            page_size=page_size,
            tree=self.tree,
            pools=pools,
            state_interval=scenario["state_interval"],
        )
        num_drafts = scenario["drafts"]
        by_rank = scenario["by_rank"] and scenario["feed"] is TokenFeed.ROW
        speculation = Speculation(
            None if by_rank else SometimesRight(),
            self.ledger,
            most_drafts=num_drafts,
            most_step_tokens=scenario["step_tokens"],
            context_length=MAX_CONTEXT,
            clock=self.clock,
            costs=StepCosts() if scenario["adapts"] else None,
            overlaps=by_rank and not self.ledger.keeps_states,
        )
        self.adapters = AdapterSlots(
            scenario["adapters_at_once"], scenario["adapter_bytes"], scenario["adapter_policy"]
        )
        for adapter_id, num_bytes in ADAPTERS.items():
            assert self.adapters.add(adapter_id, num_bytes) is None
        num_stages = 1 if scenario["feed"] is TokenFeed.ROW else scenario["stages"]
        ranks = [SimulatedRank(self.sizes, page_size, pools, host_sizes) for _ in range(num_stages)]
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_running_requests=scenario["max_running"],
                max_queued_requests=100,
                chunked_prefill_size=scenario["chunk"],
                schedule_policy=scenario["policy"],
                schedule_conservativeness=scenario["conservativeness"],
                in_batch_prefix_threshold=scenario["threshold"],
                overlap_depth=scenario["depth"],
                enable_priority_scheduling=True,
                priority_scheduling_preemption_threshold=scenario["preemption"],
                schedule_low_priority_values_first=scenario["low_first"],
                priority_aging_interval=scenario["aging"],
                max_prefill_tokens=scenario["prefill_tokens"],
                prefill_max_requests=scenario["prefill_requests"],
                enable_prefill_delayer=scenario["delayer"],
                prefill_delayer_max_delay_passes=3,
            ),
            self.ledger,
            context_length=MAX_CONTEXT,
            vocab_size=100,
            eos_token_ids=EOS,
            clock=self.clock,
            token_feed=scenario["feed"],
            most_decodes=scenario["most_decodes"],
            speculation=speculation if num_drafts else None,
            adapters=self.adapters,
            tiers=self._tiers(scenario, ranks, pools, events),
        )
        *others, self.rank = ranks
        for stage in others:
            stage.is_last = False
        self.rank.pause_s = scenario["pause_s"]
        self.executor = DelayedExecutor(self.rank, others)
        self.depth = scenario["depth"]
        self.in_flight: deque[tuple[object, object]] = deque()
        self.tokens: dict[str, list[int]] = {}
        self.finishes: dict[str, Finish] = {}

    def _tiers(
        self,
        scenario: dict[str, object],
        ranks: list[SimulatedRank],
        pools: list[CachePool],
        events: KVEventSource | None,
    ) -> CacheTiers | None:
        """The tiers behind the pools, with a storage if the scenario has a seed for it."""
        if self.host is None:
            return None
        stored = None
        if scenario["storage"] is not None:
            random = Random(scenario["storage"])
            stored = StoredPages(
                self.host,
                self.ledger.needs,
                SimulatedParts(ranks, self.kept, random),
                self.clock,
                CostRule(Rate(), Rate()),
                CopyNames("model", "0" * 16, pools),
                PrefetchRules(policy=PrefetchPolicy.TIMEOUT, threshold=1, base_s=4.0),
                SharedNames(
                    lambda name: None if name == "middle" else f"content of {name}",
                    has_lengths=False,
                ),
                events=events,
                worker=lambda name: ScriptedWorker(random),
            )
            stored.attach("simulated", {})
        return CacheTiers(self.ledger, self.host, stored=stored, least_tokens=1)

    def take(self, output: RequestOutput | None) -> None:
        if output is None:
            return
        assert output.request_id not in self.finishes, "an output after the terminal one"
        self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
        if output.finish is not None:
            self.finishes[output.request_id] = output.finish

    def step(self) -> None:
        self.clock.advance(0.5)
        num_preemptions = self.scheduler.status().num_preemptions
        plan = self.scheduler.plan()
        self.check()
        if self.scheduler.status().num_preemptions > num_preemptions:
            assert plan is not None
            assert plan.starts, "requests were preempted and nobody was let in"
        if plan is not None:
            self.in_flight.append((plan, self.executor.launch(plan)))
        if self.in_flight and (plan is None or len(self.in_flight) >= self.depth):
            done, handle = self.in_flight.popleft()
            for output in self.scheduler.update(done, handle.result()):
                self.take(output)
            self.check()

    def check(self) -> None:
        self.ledger.check()
        for slots in [] if self.host is None else self.host.slots:
            slots.check()
        assert self.adapters.bytes_used <= self.adapters.max_bytes
        running = {state.options.adapter for state in self.scheduler._running} - {""}
        assert len(running) <= self.adapters.max_per_batch
        if self.tree is not None:
            self.mirror.check(self.tree)
            if self.has_events:
                self.follower.check(self.mirror, self.tree._full)
            if self.has_events and self.host is not None:
                copies = self.host.slots[self.tree._full]._copies
                self.follower.check_host([one for one, copy in copies.items() if copy.is_filled])


@settings(max_examples=examples(1000))
@given(scenarios(is_plain=True))
def test_one_owner_per_page_and_outputs_independent_of_the_schedule(
    scenario: dict[str, object],
) -> None:
    run(scenario)


@settings(max_examples=examples(1000))
@given(scenarios())
def test_the_same_with_windows_and_states(scenario: dict[str, object]) -> None:
    run(scenario)


def overlaps_guesses(scenario: dict[str, object]) -> dict[str, object]:
    """The same without states, where ranks guess and steps overlap."""
    pools = [pool for pool in scenario["pools"] if pool[0].kind is not CacheKind.STATE]
    asked = {"by_rank": True, "feed": TokenFeed.ROW, "depth": max(scenario["depth"], 2)}
    drafts = {"drafts": max(scenario["drafts"], 2), "step_tokens": 32}
    return {**scenario, **asked, **drafts, "pools": pools or [(FULL_POOL, 40)]}


@settings(max_examples=examples(1000, usual=60))
@given(scenarios().map(overlaps_guesses))
def test_the_same_where_ranks_go_on_by_themselves(scenario: dict[str, object]) -> None:
    run(scenario)


@settings(max_examples=examples(500, usual=36))
@given(scenarios(has_groups=True))
def test_the_same_with_latent_rows_windows_and_states_together(
    scenario: dict[str, object],
) -> None:
    run(scenario)


def returns_to_prefixes(scenario: dict[str, object]) -> dict[str, object]:
    """The same prompts three times, in pools that hold few of them, with a host tier."""
    again = [
        {**one, "arrives": one["arrives"] + 15 * turn, "aborted": one["aborted"] if turn else None}
        for turn in range(3)
        for one in scenario["requests"][:5]
    ]
    pools = [
        (pool, size if pool.kind is not CacheKind.FULL else -(-64 // scenario["page_size"]))
        for pool, size in scenario["pools"]
    ]
    tier = {"host_sizes": scenario["host_sizes"] or [40, 12], "prefixes": True, "threshold": -1}
    return {**scenario, **tier, "requests": again, "pools": pools}


TWO_STATES = {
    "page_size": 2,
    "pools": [(FULL_POOL, 32), (CachePool(CacheKind.STATE, (1,)), 2)],
    "state_interval": 4,
    "policy": "fcfs",
    "eviction": "lru",
    "prefixes": True,
    "chunk": 64,
    "max_running": 3,
    "conservativeness": 0.0,
    "threshold": -1,
    "depth": 2,
    "preemption": 0,
    "low_first": True,
    "aging": 0.0,
    "pause_s": 0.0,
    "delayer": False,
    "prefill_tokens": None,
    "prefill_requests": None,
    "feed": TokenFeed.ROW,
    "stages": 1,
    "most_decodes": None,
    "drafts": 0,
    "by_rank": False,
    "step_tokens": 6,
    "adapts": False,
    "adapters_at_once": 3,
    "adapter_bytes": 8,
    "host_sizes": [40, 12],
    "write_policy": WritePolicy.WRITE_THROUGH,
    "storage": None,
    "adapter_policy": "lru",
}
"""A scenario without requests: two of them have a state on the device at a time."""


@settings(max_examples=examples(1000, usual=60))
@given((scenarios() | scenarios(has_groups=True)).map(returns_to_prefixes))
def test_the_same_with_a_host_tier(scenario: dict[str, object]) -> None:
    run(scenario)


@settings(max_examples=examples(1000, usual=40))
@given((scenarios() | scenarios(has_groups=True)).map(returns_to_prefixes), st.integers(0, 1 << 30))
def test_the_same_with_a_storage_that_engines_share(scenario: dict[str, object], seed: int) -> None:
    kept: dict[str, list[object]] = {}
    for _ in range(2):  # the second one finds what the first has left
        run({**scenario, "storage": seed, "write_policy": WritePolicy.WRITE_THROUGH}, kept)


def test_one_request_hits_a_state_and_another_brings_one_back_in_the_same_plan() -> None:
    on_host, on_device = [1, 2, 3, 4, 5], [11, 12, 13, 14, 15]
    arrivals = [(0, on_host), (20, on_device), (40, on_device), (40, on_host)]
    requests = [
        {
            "prompt": prompt,
            "max_new": 2,
            "extra_key": "",
            "priority": None,
            "routing_key": "",
            "adapter": "",
            "arrives": turn,
            "aborted": None,
        }
        for turn, prompt in arrivals
    ]
    run({**TWO_STATES, "requests": requests})


def run(scenario: dict[str, object], kept: dict[str, list[object]] | None = None) -> None:
    world = World(scenario, kept)
    requests = {f"r{index}": one for index, one in enumerate(scenario["requests"])}
    for turn in range(3000):
        for request_id, one in requests.items():
            if one["arrives"] == turn:
                world.take(world.scheduler.add(_generate(request_id, one)))
            if one["aborted"] == turn:
                world.take(world.scheduler.abort(request_id))
        world.step()
        if turn > 80 and not world.scheduler.has_open_requests and not world.in_flight:
            break
    assert not world.scheduler.has_open_requests, "a request never ended"
    assert world.finishes.keys() == requests.keys()
    for request_id, one in requests.items():
        _check_output(world, scenario, request_id, one)
    assert world.scheduler.status().num_leased_pages == 0
    assert world.scheduler.flush_cache()
    assert all(world.adapters.remove(adapter_id) for adapter_id in ADAPTERS)
    assert world.adapters.num_slots_used == 0
    assert [allocator.num_free for allocator in world.ledger._allocators] == world.sizes
    world.check()


def _generate(request_id: str, one: dict[str, object]) -> Generate:
    return Generate(
        request_id=request_id,
        prompt_ids=one["prompt"],
        options=RequestOptions(
            sampling=SamplingParams(max_new_tokens=one["max_new"], temperature=0.0),
            namespace=one["extra_key"],
            priority=one["priority"],
            routing_key=one["routing_key"],
            adapter=one["adapter"],
        ),
    )


def _check_output(
    world: World, scenario: dict[str, object], request_id: str, one: dict[str, object]
) -> None:
    finish = world.finishes[request_id]
    pool, size = scenario["pools"][0]
    most = size * scenario["page_size"] if pool.kind is CacheKind.FULL else MAX_CONTEXT
    room = min(MAX_CONTEXT, most) - len(one["prompt"])
    tokens = world.tokens[request_id]
    if finish.kind == "error":
        assert room < 1
        assert "accepts at most" in finish.message
        return
    expected = expected_outputs(one["prompt"], min(one["max_new"], room), EOS)
    if finish.kind == "abort":
        assert one["aborted"] is not None
        assert tokens == expected[: len(tokens)]
    else:
        assert tokens == expected
        assert finish.kind == ("stop" if expected and expected[-1] in EOS else "length")
