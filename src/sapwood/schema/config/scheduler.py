"""Which requests a step computes, and how many of their tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option

POLICIES = ("fcfs", "lpm", "dfs-weight", "lof", "random", "priority", "routing-key")
DEFAULT_PREEMPTION_THRESHOLD = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Which requests a step computes, as asked."""

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
    max_prefill_tokens: int | None = option(
        None,
        "Prompt tokens per step at most, while output tokens take what else fits into "
        "--chunked-prefill-size; default: as many as that. A prompt that is longer is computed in "
        "chunks.",
        unit="tokens",
    )
    prefill_max_requests: int | None = option(
        None,
        "Requests whose prompts one step computes at most; default: any number.",
        unit="requests",
    )
    stream_interval: int = option(
        1,
        "Tokens that an event of a stream has at least, but for the first and the last one; a "
        "request may ask for more.",
        unit="tokens",
    )
    stream_output: bool = option(
        False,
        "Each event of a /generate stream has only the new output_ids; default: all so far. Its "
        "text is always the whole text so far.",
    )
    allow_auto_truncate: bool = option(
        False,
        "Cut a prompt of text or token ids that is longer than the context, at its end; default: "
        "it is refused.",
    )
    max_step_time_ms: float = option(
        250.0,
        "While requests decode, a step computes only as many prompt tokens as fit into this time, "
        "by what steps before it took, and 64 in any case: so a long prompt holds others up no "
        "longer, however slow the machine. 0: as many as --chunked-prefill-size says.",
        unit="milliseconds",
    )
    schedule_policy: str = option(
        "lpm",
        "Order of the waiting requests: fcfs first come first served; lpm longest prefix match; "
        "dfs-weight depth first over the prefix tree, heaviest subtree first; lof longest output "
        "first; random; priority highest priority first, which implies "
        "--enable-priority-scheduling; routing-key the keys that most running requests have first.",
        choices=POLICIES,
        plugins="sapwood.schedule_policies",
    )
    max_prompt_tokens: int | None = option(
        None,
        "Longer prompts are refused with 400; default: as long as the context length allows.",
        aliases=("max-req-input-len",),
        unit="tokens",
    )
    queue_timeout: float = option(
        0.0,
        "A request that has waited this long without being begun ends with 503. 0: never.",
        unit="seconds",
    )
    request_timeout: float = option(
        0.0,
        "A request that has not ended this long after it arrived ends with 504. 0: never.",
        unit="seconds",
    )
    enable_priority_scheduling: bool = option(
        False,
        "Take the priority of requests: more urgent ones come first, and may preempt running ones. "
        "Without it, a request may only ask to be less urgent than the default.",
    )
    schedule_low_priority_values_first: bool = option(
        False, "Smaller priority values are more urgent; needs --enable-priority-scheduling."
    )
    default_priority_value: int = option(0, "Priority of requests that bring none.")
    priority_scheduling_preemption_threshold: int = option(
        DEFAULT_PREEMPTION_THRESHOLD,
        "A waiting request takes the place of a running one if it is more urgent by more than "
        "this; needs --enable-priority-scheduling.",
    )
    priority_aging_interval: float = option(
        0.0,
        "A request becomes more urgent by one priority value each time it has been here for this "
        "long, so that none starves, whatever the policy. 0: never.",
        unit="seconds",
    )
    enable_prefill_delayer: bool = option(
        False,
        "While requests decode, hold new prompts back until they fill a step, or for "
        "--prefill-delayer-max-delay-passes steps: fewer steps are slowed down by a prompt.",
    )
    prefill_delayer_max_delay_passes: int = option(
        30, "Steps for which the prefill delayer holds a prompt back at most.", unit="steps"
    )
    prefill_delayer_token_usage_low_watermark: float | None = option(
        None,
        "The prefill delayer holds nothing back while less than this share of the KV pool is in "
        "use, 0 to 1; default: it always may.",
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
    disable_overlap_schedule: bool = option(
        False, "The same as --overlap-depth 1: a step is prepared when the one before has ended."
    )
    random_seed: int = option(0, "Seed of requests that bring none, and of the random policy.")

    def __post_init__(self) -> None:
        check_options(self)
        self._check_priorities()
        self._check_limits()
        if self.disable_overlap_schedule and self.overlap_depth not in (None, 1):
            raise ConfigError(
                f"--disable-overlap-schedule contradicts --overlap-depth {self.overlap_depth}; "
                "leave one of them out"
            )
        for name in (
            "max_running_requests",
            "overlap_depth",
            "max_prompt_tokens",
            "max_prefill_tokens",
            "prefill_max_requests",
            "stream_interval",
        ):
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

    def _check_priorities(self) -> None:
        """Options that would do nothing are an error."""
        if self.enable_priority_scheduling or self.schedule_policy == "priority":
            if self.priority_scheduling_preemption_threshold < 0:
                raise ConfigError(
                    "--priority-scheduling-preemption-threshold is "
                    f"{self.priority_scheduling_preemption_threshold} but must be >= 0"
                )
            return
        for name, default in (
            ("schedule_low_priority_values_first", False),
            ("priority_scheduling_preemption_threshold", DEFAULT_PREEMPTION_THRESHOLD),
            ("default_priority_value", 0),
        ):
            if getattr(self, name) != default:
                raise ConfigError(
                    f"--{name.replace('_', '-')} does nothing without "
                    "--enable-priority-scheduling; give both or neither"
                )

    def _check_limits(self) -> None:
        for name in (
            "max_step_time_ms",
            "queue_timeout",
            "request_timeout",
            "priority_aging_interval",
        ):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {value} but must be a finite number >= 0"
                )
        if self.prefill_delayer_max_delay_passes < 1:
            raise ConfigError(
                "--prefill-delayer-max-delay-passes is "
                f"{self.prefill_delayer_max_delay_passes} but must be >= 1"
            )
        watermark = self.prefill_delayer_token_usage_low_watermark
        if watermark is not None and not 0 <= watermark <= 1:
            raise ConfigError(
                f"--prefill-delayer-token-usage-low-watermark is {watermark} but must be from 0 "
                "to 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedScheduler(SchedulerConfig):
    """After resolution: every limit is a number."""

    max_running_requests: int
    max_queued_requests: int
    chunked_prefill_size: int
    overlap_depth: int
