"""Builds an engine out of a resolved configuration: runner, memory, scheduler, loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sapwood.app.building.adapters import AdapterLoader, AdapterParts
from sapwood.app.building.grammars import build_grammars
from sapwood.app.building.handover import departures, handovers_of, landing_tier, landing_tiers
from sapwood.app.building.loading import LoadWatch, timed
from sapwood.app.building.resolving import Resolved
from sapwood.app.building.runners import StepRunner, build_runner
from sapwood.app.building.speculation import build_speculation
from sapwood.app.building.tiers import cache_tiers, host_tier, own_parts, tier_desk
from sapwood.app.building.towers import media_vectors
from sapwood.app.ranks.member import ALONE, facts_of, lead
from sapwood.app.ranks.ranks import RankTeam, explained_by
from sapwood.app.ranks.team_adapters import TeamAdapters
from sapwood.app.ranks.team_parts import TeamParts
from sapwood.app.ranks.team_weights import TeamWeights
from sapwood.app.serving.joint_engines import JointEngines
from sapwood.base.channel import Receiver, Sender
from sapwood.base.clock import MonotonicClock
from sapwood.base.errors import ConfigError
from sapwood.engine.adapters import AdapterDesk
from sapwood.engine.departures import Departures
from sapwood.engine.instruments import Instruments
from sapwood.engine.loop import EngineLoop
from sapwood.engine.request_state import adapter_in
from sapwood.engine.scheduler import Scheduler
from sapwood.engine.steering import (
    NO_WEIGHTS,
    NO_WEIGHTS_OF_TOWERS,
    ModelMemory,
    Steering,
)
from sapwood.engine.tiers import CacheTiers
from sapwood.executor.grammar.compiler import GrammarCompiler
from sapwood.executor.launch import (
    OverlappedExecutor,
    OverlappedLaunches,
    QueuedExecutor,
    SerialExecutor,
    TeamExecutor,
)
from sapwood.executor.per_token import EXPERT_BYTES
from sapwood.memory.eviction import EVICTION_POLICIES
from sapwood.memory.kv_events import KVEventSource
from sapwood.memory.kv_publisher import KVPublisher
from sapwood.memory.ledger import Ledger
from sapwood.memory.listener import CacheListener, Listeners
from sapwood.memory.prefix_tree import PrefixTree
from sapwood.memory.storage.parts import PageParts
from sapwood.memory.tiers.host import HostTier
from sapwood.models.config import DecoderConfig
from sapwood.schema.cache import FULL_POOL, CacheKind, CachePool
from sapwood.schema.config.decision import Decision
from sapwood.schema.output import EngineOutput, EngineReady, PoolFacts, RankFacts
from sapwood.schema.request import EngineInput
from sapwood.schema.step import TokenFeed

OwnExecutor = SerialExecutor | OverlappedExecutor | OverlappedLaunches | QueuedExecutor
Executor = OwnExecutor | TeamExecutor


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An engine. `run` serves until it is drained or fails; close the engine in any case."""

    loop: EngineLoop
    ready: EngineReady
    scheduler: Scheduler
    executor: Executor
    grammars: GrammarCompiler | None = None
    adapters: AdapterLoader | None = None
    team: RankTeam | None = None
    kv_events: KVPublisher | None = None
    tiers: CacheTiers | None = None
    departures: Departures | None = None

    def prepare_grammars(self) -> None:
        """Get ready for grammars beside the first steps."""
        if self.grammars is not None:
            self.grammars.prepare()

    def run(self) -> None:
        """Serve until the engine is drained or fails. RankLost if another rank is the reason."""
        with explained_by(self.team):
            self.loop.run()

    def close(self) -> None:
        """Wait for the engine's own threads and for its other ranks. May be called twice.

        After a failed step the next one may still run. The interpreter must not end before it: a
        thread that returned from native code later would crash the process."""
        if self.team is not None and self.team.failure() is not None:
            self.team.close()  # first: a step may wait for a rank that is stuck
        self.executor.close()
        if self.tiers is not None:
            self.tiers.close()  # what waits to be written may be on other ranks
        if self.team is not None:
            self.team.close()
        if self.grammars is not None:
            self.grammars.close()
        if self.adapters is not None:
            self.adapters.close()
        if self.kv_events is not None:
            self.kv_events.close()
        if self.departures is not None:
            self.departures.close()


def build_engine(
    resolved: Resolved,
    receiver: Receiver[EngineInput],
    sender: Sender[EngineOutput],
    *,
    instruments: Instruments | None = None,
    watch: LoadWatch | None = None,
    team: RankTeam | None = None,
    joint: JointEngines | None = None,
) -> Engine:
    """Load the model and connect all parts of an engine on rank 0.

    instruments  observe the loop
    watch        follows the loading of weights
    team         the other ranks, if there are any; the engine closes them
    joint        the engines with which this one shares feed-forwards, if there are any
    Raises       RankLost if one of these fails
    """
    if team is None:
        if resolved.config.parallel.num_ranks > 1:
            raise ConfigError(
                "this program computes with one rank; leave out --tp-size and --pp-size"
            )
        return _build_engine(resolved, receiver, sender, instruments, watch, None, joint)
    try:
        with explained_by(team):
            return _build_engine(resolved, receiver, sender, instruments, watch, team, None)
    except BaseException:
        team.close()
        raise


def _build_engine(
    resolved: Resolved,
    receiver: Receiver[EngineInput],
    sender: Sender[EngineOutput],
    instruments: Instruments | None,
    watch: LoadWatch | None,
    team: RankTeam | None,
    joint: JointEngines | None,
) -> Engine:
    watch = watch or LoadWatch()
    member = ALONE
    if team is not None:
        watch.beat("waiting for the other ranks")
        member = lead(team, resolved)
    elif joint is not None:
        watch.beat("waiting for the other engines")
        member = joint.member(resolved)
    resolved = member.agreed(resolved)
    if resolved.device.type == "cpu":
        torch.set_num_threads(resolved.config.execution.num_threads)
    clock = MonotonicClock()
    grammars = None
    if resolved.pooling is None:
        grammars = build_grammars(
            resolved.config,
            resolved.files.path,
            vocab_size=resolved.shape.vocab_size,
            eos_token_ids=resolved.eos,
            clock=clock,
        )
    runner = build_runner(resolved, watch, grammars, member)
    resolved, adapters = runner.resolved, runner.adapters
    ranks: list[RankFacts] = []
    if team is not None:
        watch.beat("waiting for the other ranks to load their parts")
        ranks = [facts_of(0, resolved, watch), *team.ready()]
    config = resolved.config
    steps_s: dict[int, float] = {}
    if not config.execution.skip_server_warmup:
        watch.beat("warming up")
        with timed("warm-up"):
            execute = runner.execute if team is None else team.leading(runner.execute)
            runner.warm_up(execute)
            if runner.measure is not None and config.speculation.adapts:
                steps_s = runner.measure(execute, _step_sizes(resolved))
                resolved.decisions.append(_explained(steps_s))
    kv_events = _kv_publisher(resolved)
    host = host_tier(resolved)
    events = None if kv_events is None else _event_source(resolved, kv_events)
    ledger = _build_ledger(resolved, events, host)
    tiers = None
    slots = None if adapters is None else adapters.slots
    if host is not None and runner.copies is not None:
        parts: PageParts = own_parts(resolved, runner.copies, 0)
        if team is not None:
            parts = TeamParts(parts, team)
        tiers = cache_tiers(resolved, ledger, host, runner.copies, parts, clock, slots, events)
    landing, arrivals = landing_tier(resolved), None
    if landing is not None and runner.copies is not None:
        tiers, arrivals = landing_tiers(resolved, ledger, landing, runner.copies, slots)
    leaving = departures(resolved, ledger, runner.pages, clock, slots)
    speculation = build_speculation(config, ledger, clock, steps_s)
    scheduler = Scheduler(
        config.scheduler,
        ledger,
        context_length=config.model.context_length,
        vocab_size=resolved.shape.vocab_size,
        eos_token_ids=resolved.eos,
        clock=clock,
        pooling=resolved.pooling,
        hidden_size=resolved.shape.hidden_size,
        grammars=None if grammars is None else grammars.ranks,
        token_feed=TokenFeed.ROW if config.parallel.pp_size == 1 else TokenFeed.SCHEDULER,
        most_decodes=config.parallel.most_decodes(config.scheduler.max_running_requests),
        speculation=speculation,
        switch_length=resolved.shape.switch_length
        if isinstance(resolved.shape, DecoderConfig)
        else None,
        adapters=slots,
        media=media_vectors(resolved, runner.tower),
        tiers=tiers,
        handovers=handovers_of(resolved, leaving, arrivals),
    )
    # A launch of a step with guesses waits for the device.
    waits = speculation is not None and speculation.overlaps
    executor = _executor(runner, config.scheduler.overlap_depth, team, launches_wait=waits)
    loop = EngineLoop(
        scheduler,
        executor,
        receiver,
        sender,
        depth=config.scheduler.overlap_depth,
        clock=clock,
        instruments=instruments,
        adapters=None if adapters is None else _desk(adapters, team),
        joint=None if joint is None else joint.steps(config.parallel.tp_size),
        experts=runner.expert_record,
        kv_events=kv_events,
        steering=Steering(
            scheduler,
            _memory(runner, team),
            why_none=NO_WEIGHTS if runner.tower is None else NO_WEIGHTS_OF_TOWERS,
        ),
        tiers=tier_desk(resolved, tiers),
    )
    return Engine(
        loop=loop,
        ready=_ready(resolved, watch, ranks),
        team=team,
        scheduler=scheduler,
        executor=executor,
        grammars=None if grammars is None else grammars.compiler,
        adapters=None if adapters is None else adapters.loader,
        kv_events=kv_events,
        tiers=tiers,
        departures=leaving,
    )


def _memory(runner: StepRunner, team: RankTeam | None) -> ModelMemory | None:
    """The weights and caches of all ranks."""
    if runner.memory is None or team is None:
        return runner.memory
    return TeamWeights(runner.memory, team)


def _step_sizes(resolved: Resolved) -> list[int]:
    """New tokens of the steps to be measured, which fit into every pool: powers of two, and one
    more where kernels begin another tile of rows."""
    config = resolved.config
    page_size = config.memory.page_size
    pools, sizes = _pools(resolved)
    room = min(
        size * page_size
        for pool, size in zip(pools, sizes, strict=True)
        if pool.kind is not CacheKind.STATE
    )
    most = min(config.speculation.speculative_max_step_tokens, room, config.model.context_length)
    return [size for size in (1, 2, 4, 8, 16, 17, 32, 33, 64, 65, 128) if size <= most]


def _explained(steps_s: Mapping[int, float]) -> Decision:
    """What was measured, for the operator."""
    ratios = ", ".join(f"{size}: {took / steps_s[1]:.1f}" for size, took in steps_s.items())
    reason = f"guesses adapt to what steps cost by their tokens, of {1e3 * steps_s[1]:.2f} ms"
    return Decision("speculative_step_costs", ratios, reason)


def _ready(resolved: Resolved, watch: LoadWatch, ranks: Sequence[RankFacts]) -> EngineReady:
    config = resolved.config
    return EngineReady(
        ranks=tuple(ranks),
        context_length=config.model.context_length,
        max_total_tokens=config.memory.max_total_tokens,
        page_size=config.memory.page_size,
        notes=[str(decision) for decision in resolved.decisions],
        options=config.shown(),
        max_running_requests=config.scheduler.max_running_requests,
        load_s=watch.load_s,
        weight_bytes=watch.weight_bytes,
        routed_bytes=_routed_bytes(resolved),
        pools=_pool_facts(resolved),
    )


def _routed_bytes(resolved: Resolved) -> int:
    if not resolved.config.execution.enable_return_routed_experts:
        return 0
    experts = resolved.decoder.experts
    assert experts is not None, "the option is refused for models without experts"
    return resolved.decoder.num_layers * experts.num_per_token * EXPERT_BYTES


def _pool_facts(resolved: Resolved) -> tuple[PoolFacts, ...]:
    cache = resolved.cache
    pools, sizes = _pools(resolved)
    return tuple(
        PoolFacts(
            name=pool.name, size=size, unit_bytes=cache.unit_bytes(pool) if cache.groups else 0
        )
        for pool, size in zip(pools, sizes, strict=True)
    )


def _pools(resolved: Resolved) -> tuple[tuple[CachePool, ...], tuple[int, ...]]:
    """(the pools, their pages or slots); an encoder's texts take pages of no memory"""
    memory = resolved.config.memory
    if resolved.cache.groups:
        return resolved.cache.pools, resolved.pool_sizes
    return (FULL_POOL,), (memory.max_total_tokens // memory.page_size,)


def _executor(
    runner: StepRunner, depth: int, team: RankTeam | None, *, launches_wait: bool
) -> Executor:
    """The executor for this device and depth, which has all ranks compute each step."""
    executor: OwnExecutor = SerialExecutor(runner.execute)
    if depth > 1 and runner.launch is None:
        executor = OverlappedExecutor(runner.execute)
    elif depth > 1 and runner.launch is not None and launches_wait:
        executor = OverlappedLaunches(runner.launch)
    elif depth > 1 and runner.launch is not None:
        executor = QueuedExecutor(runner.launch)
    return executor if team is None else TeamExecutor(executor, team.run)


def _desk(adapters: AdapterParts, team: RankTeam | None) -> AdapterDesk:
    """What has all ranks load adapters."""
    own = adapters.loader
    return AdapterDesk(adapters.slots, own if team is None else TeamAdapters(own, team))


def _kv_publisher(resolved: Resolved) -> KVPublisher | None:
    config = resolved.config.memory.kv_events
    return KVPublisher(config, resolved.replica) if config.is_on else None


def _event_source(resolved: Resolved, publisher: KVPublisher) -> KVEventSource:
    """Tells the publisher of the pages that keep every token."""
    shape, (pools, _) = resolved.shape, _pools(resolved)
    has_lengths = isinstance(shape, DecoderConfig) and shape.switch_length is not None
    return KVEventSource(
        publisher.put,
        pool=next(at for at, pool in enumerate(pools) if pool.kind is CacheKind.FULL),
        adapter_of=partial(adapter_in, has_lengths=has_lengths),
    )


def _build_ledger(
    resolved: Resolved, events: KVEventSource | None, host: HostTier | None
) -> Ledger:
    memory, (pools, sizes) = resolved.config.memory, _pools(resolved)
    tree = None
    if not memory.disable_radix_cache:
        eviction_key = EVICTION_POLICIES[memory.radix_eviction_policy]
        listener: CacheListener | None = host
        if events is not None:
            listener = events if host is None else Listeners(events, host)
        tree = PrefixTree(memory.page_size, eviction_key, pools, listener)
    return Ledger(
        num_pages=sizes,
        page_size=memory.page_size,
        tree=tree,
        pools=pools,
        state_interval=memory.mamba_track_interval or memory.page_size,
    )
