"""Which requests a step computes, and how many of their tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option

POLICIES = ("fcfs", "lpm", "dfs-weight", "lof", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """After resolution every None is set."""

    max_running_requests: int | None = option(
        None, "Requests computed together at most.", unit="requests"
    )
    max_queued_requests: int | None = option(
        None, "Requests waiting at most; one more is refused with 503.", unit="requests"
    )
    chunked_prefill_size: int | None = option(
        None,
        "New tokens per step at most, prefill and decode together; a longer prompt is computed in "
        "chunks. -1: no limit.",
        unit="tokens",
    )
    schedule_policy: str = option(
        "lpm",
        "Order of the waiting requests: fcfs first come first served; lpm longest prefix match; "
        "dfs-weight depth first over the prefix tree, heaviest subtree first; lof longest output "
        "first; random.",
        choices=POLICIES,
    )
    schedule_conservativeness: float = option(
        1.0,
        "Scales the share of each request's outstanding output tokens that admission reserves; "
        "larger retracts less often, smaller admits more.",
    )
    in_batch_prefix_threshold: int = option(
        32,
        "A waiting request waits for another that is computing its prefix if they share at least "
        "this many more tokens than the cache holds. -1: never.",
        unit="tokens",
    )
    overlap_depth: int | None = option(
        None,
        "Steps in flight at most; 2 prepares a step while the previous one runs.",
        unit="steps",
    )
    random_seed: int = option(0, "Seed of requests that bring none, and of the random policy.")

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("max_running_requests", "overlap_depth"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value} but must be >= 1")
        if self.max_queued_requests is not None and self.max_queued_requests < 0:
            raise ConfigError(
                f"--max-queued-requests is {self.max_queued_requests} but must be >= 0"
            )
        chunk = self.chunked_prefill_size
        if chunk is not None and chunk != -1 and chunk < 1:
            raise ConfigError(f"--chunked-prefill-size is {chunk} but must be -1 or >= 1")
        if not 0 <= self.schedule_conservativeness < math.inf:
            raise ConfigError(
                f"--schedule-conservativeness is {self.schedule_conservativeness} but must be a "
                "finite number >= 0"
            )
        if self.in_batch_prefix_threshold < -1:
            raise ConfigError(
                f"--in-batch-prefix-threshold is {self.in_batch_prefix_threshold} but must be "
                "-1 or >= 0"
            )
