"""Measures the cost of scheduling: steps of a real scheduler and ledger without a model."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from sapwood.base.clock import MonotonicClock
from sapwood.base.errors import ConfigError
from sapwood.engine.scheduler import Scheduler
from sapwood.memory.eviction import least_recently_used
from sapwood.memory.ledger import Ledger
from sapwood.memory.prefix_tree import PrefixTree
from sapwood.schema.config.options import option
from sapwood.schema.config.scheduler import ResolvedScheduler
from sapwood.schema.request import Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import StepPlan, StepResult

PAGE_SIZE = 16
PROMPT_TOKENS = 128
OUTPUT_TOKENS = 10_000
VOCAB = 40_000


DEFAULT_SIZES = "1,8,32,64,128,256,512"


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """How the scheduler is measured."""

    running: str = option(DEFAULT_SIZES, "Numbers of running requests to measure, with commas.")
    waiting: int = option(100, "Requests that wait meanwhile.", unit="requests")
    steps: int = option(200, "Measured steps per size.", unit="steps")
    seed: int = option(0, "Seed of prompts and tokens.")

    @property
    def sizes(self) -> list[int]:
        """The numbers in `running`; ConfigError if one is not a whole number >= 1."""
        parts = [part.strip() for part in self.running.split(",")]
        if not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ConfigError(f"--running is {self.running!r} but must look like {DEFAULT_SIZES}")
        return [int(part) for part in parts]

    def __post_init__(self) -> None:
        if self.steps < 2 or self.waiting < 0:
            raise ConfigError("--steps must be >= 2 and --waiting >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerCost:
    """Seconds of one decode step's `plan` and `update` together, over all measured steps."""

    num_running: int
    num_waiting: int
    median_s: float
    p99_s: float

    @property
    def per_request_s(self) -> float:
        return self.median_s / self.num_running


def measure_scheduler(
    *, num_running: int, num_waiting: int, num_steps: int, seed: int
) -> SchedulerCost:
    """Decode steps of `num_running` requests while `num_waiting` others cannot be admitted."""
    scheduler = _scheduler(num_running, seed)
    rng = random.Random(seed)
    for index in range(num_running + num_waiting):
        scheduler.add(_request(index, rng))
    while scheduler.status().num_running < num_running:
        _step(scheduler, rng)
    seconds = [_step(scheduler, rng) for _ in range(num_steps)]
    return SchedulerCost(
        num_running=num_running,
        num_waiting=num_waiting,
        median_s=statistics.median(seconds),
        p99_s=statistics.quantiles(seconds, n=100)[98],
    )


def measure_growth(options: SchedulerOptions) -> list[SchedulerCost]:
    """The costs for each number of running requests; their ratio shows how the cost grows."""
    return [
        measure_scheduler(
            num_running=size,
            num_waiting=options.waiting,
            num_steps=options.steps,
            seed=options.seed,
        )
        for size in options.sizes
    ]


def cost_table(costs: Sequence[SchedulerCost]) -> Table:
    table = Table("running", "waiting", "median ms", "p99 ms", "us per request")
    for cost in costs:
        table.add_row(
            str(cost.num_running),
            str(cost.num_waiting),
            f"{cost.median_s * 1e3:.3f}",
            f"{cost.p99_s * 1e3:.3f}",
            f"{cost.per_request_s * 1e6:.2f}",
        )
    return table


def _scheduler(num_running: int, seed: int) -> Scheduler:
    num_pages = num_running * (PROMPT_TOKENS + OUTPUT_TOKENS) // PAGE_SIZE
    ledger = Ledger(
        num_pages=num_pages, page_size=PAGE_SIZE, tree=PrefixTree(PAGE_SIZE, least_recently_used)
    )
    config = ResolvedScheduler(
        max_running_requests=num_running,
        max_queued_requests=100_000,
        chunked_prefill_size=8192,
        overlap_depth=1,
        random_seed=seed,
    )
    return Scheduler(
        config,
        ledger,
        context_length=PROMPT_TOKENS + OUTPUT_TOKENS,
        vocab_size=VOCAB,
        eos_token_ids=(),
        clock=MonotonicClock(),
    )


def _request(index: int, rng: random.Random) -> Generate:
    return Generate(
        request_id=str(index),
        prompt_ids=[rng.randrange(VOCAB) for _ in range(PROMPT_TOKENS)],
        options=RequestOptions(
            sampling=SamplingParams(max_new_tokens=OUTPUT_TOKENS, temperature=0.0)
        ),
    )


def _step(scheduler: Scheduler, rng: random.Random) -> float:
    """Seconds of one step's bookkeeping, without the time of the simulated model."""
    begin = time.perf_counter()
    plan = scheduler.plan()
    planned = time.perf_counter()
    assert plan is not None
    result = _result(plan, rng)
    finished = time.perf_counter()
    scheduler.update(plan, result)
    return (planned - begin) + (time.perf_counter() - finished)


def _result(plan: StepPlan, rng: random.Random) -> StepResult:
    sampled = [[rng.randrange(VOCAB)] for entry in plan.scheduled if entry.num_output is not None]
    return StepResult(step=plan.step, token_ids=sampled)
