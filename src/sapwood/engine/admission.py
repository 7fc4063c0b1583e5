"""Admission: how urgent each waiting request is, and how much of the KV pool is held back.

If every running request were to use all its output tokens at once, few could run together; most end
early and at different times. So admission reserves a share of the outstanding output tokens that
falls slowly while all goes well, and rises again when a request had to be retracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add, le

from sapwood.engine.request_state import RequestState
from sapwood.memory.ledger import Ledger
from sapwood.schema.config.scheduler import ResolvedScheduler, SchedulerConfig

INITIAL_RATIO = 0.7
LEAST_RATIO = 0.1
STEPS_TO_LEAST = 600


class OutputReserve:
    """The share of outstanding output tokens that admission reserves."""

    def __init__(self, conservativeness: float, least_tokens: int = 0) -> None:
        """least_tokens  reserved of each request at least, as far as it may still have so many"""
        self._least_tokens = least_tokens
        self._initial = min(INITIAL_RATIO * conservativeness, 1.0)
        self._least = min(LEAST_RATIO * conservativeness, 1.0)
        self._fall = (self._initial - self._least) / STEPS_TO_LEAST
        self.ratio = self._initial

    def expected_growth(self, num_outstanding: int) -> int:
        """Output tokens that a request is expected to add, out of its `num_outstanding`."""
        return max(int(num_outstanding * self.ratio) + 1, min(self._least_tokens, num_outstanding))

    def after_step(self) -> None:
        self.ratio = max(self.ratio - self._fall, self._least)

    def after_retraction(self) -> None:
        self.ratio = self._initial


class ExpectedGrowth:
    """What running requests are expected to take beyond their tokens, in every pool."""

    def __init__(self, ledger: Ledger, reserve: OutputReserve) -> None:
        self._needs = ledger.needs
        self._reserve = reserve
        self._num_tokens = 0
        self._of_windows = [0] * len(ledger.needs.windows)

    def count(self, state: RequestState, sign: int = 1) -> None:
        growth = self._reserve.expected_growth(state.num_outstanding)
        self._num_tokens += sign * growth
        if self._of_windows:
            pages = self._needs.window_growth(state.num_tokens, growth)
            for index, number in enumerate(pages):
                self._of_windows[index] += sign * number

    def of_all(self) -> list[int]:
        """Pages, or slots, of each pool."""
        return self._needs.growth(self._num_tokens, self._of_windows)


def has_room(
    *,
    missing: Sequence[int],
    kept_back: Sequence[int],
    available: Sequence[int],
    is_alone: bool,
) -> bool:
    """Whether every pool has room for a request that waits.

    missing    per pool: pages or slots that the request lacks for the tokens it has
    kept_back  those for the outputs of all running requests and for its own
    available  those that anybody may take
    is_alone   no request runs: then nothing is kept back, or a large one could never begin
    """
    if is_alone:
        return all(map(le, missing, available))
    return all(map(le, map(add, missing, kept_back), available))


class PrefillShare:
    """What prompts may take of a step besides its token budget.

    most_tokens    prompt tokens per step; None: any number
    most_requests  requests whose prompts a step computes; None: any number
    """

    def __init__(self, most_tokens: int | None, most_requests: int | None) -> None:
        self._most_tokens = most_tokens
        self._most_requests = most_requests
        self._num_tokens = 0
        self._num_requests = 0
        self.keeps_place = False
        """Whether a token of one more request is kept back: for it others were preempted."""

    def begin_step(self) -> None:
        self._num_tokens = self._num_requests = 0
        self.keeps_place = False

    def of(self, num_wanted: int) -> int:
        """How many of one more request's tokens the step may take."""
        kept = int(self.keeps_place)
        if self._most_requests is not None and self._num_requests + kept >= self._most_requests:
            return 0
        if self._most_tokens is None:
            return num_wanted
        left = self._most_tokens - self._num_tokens - kept
        return max(0, min(num_wanted, left))  # a picture that is not cut may have taken more

    def has_room_for_all(self, num_tokens: int) -> bool:
        """Whether a request fits whose tokens cannot be divided: the step's first one always."""
        return self._num_requests == 0 or self.of(num_tokens) == num_tokens

    def take(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens
        self._num_requests += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Precedence:
    """How urgent a request is; larger is sooner.

    The urgency is the priority plus one for each whole `aging_interval_s` since the arrival. So a
    request is overtaken only by requests that arrive soon after it: a request whose priority is
    larger by d overtakes only if it arrives less than (d + 1) * aging_interval_s later.

    takes_priorities      whether requests may ask to be more urgent than the default
    low_values_first      smaller priorities are sooner
    default               the priority of a request that brings none
    preemption_threshold  a waiting request may take the place of a running one that is less urgent
                          by more than this; None: never
    aging_interval_s      0: urgency does not grow
    """

    takes_priorities: bool = False
    low_values_first: bool = False
    default: int = 0
    preemption_threshold: int | None = None
    aging_interval_s: float = 0.0

    @staticmethod
    def of(config: SchedulerConfig) -> Precedence:
        is_enabled = config.enable_priority_scheduling
        return Precedence(
            takes_priorities=is_enabled,
            low_values_first=config.schedule_low_priority_values_first,
            default=config.default_priority_value,
            preemption_threshold=config.priority_scheduling_preemption_threshold
            if is_enabled
            else None,
            aging_interval_s=config.priority_aging_interval,
        )

    def why_refused(self, priority: int | None) -> str | None:
        """Why a request may not have that priority; None if it may.

        Every request may be less urgent than the default; only the operator can allow more.
        """
        if self.takes_priorities or self.rank(priority) <= self.rank(None):
            return None
        return (
            f"priority is {priority}, but this server takes none above {self.default}; leave it "
            "out, or start the server with --enable-priority-scheduling"
        )

    def rank(self, priority: int | None) -> int:
        """The request's priority as a number that is larger the sooner the request should run."""
        value = self.default if priority is None else priority
        return -value if self.low_values_first else value

    def urgency(self, rank: int, waited_s: float) -> int:
        if self.aging_interval_s <= 0:
            return rank
        return rank + int(waited_s / self.aging_interval_s)

    def may_preempt(self, waiting: int, running: int) -> bool:
        """Whether a request of urgency `waiting` may preempt a request of urgency `running`."""
        threshold = self.preemption_threshold
        return threshold is not None and waiting - running > threshold


class PrefillDelayer:
    """Holds prompts back while other requests decode, so that several are computed together.

    Every step that also computes a prompt makes all running requests wait for their next token.
    Prompts that trickle in would lengthen every step; collected, they lengthen a few.

    max_delay_passes         steps that a prompt is held back at most
    token_usage_low_watermark  no holding back while less of the KV pool than this is in use
    """

    @staticmethod
    def of(config: ResolvedScheduler) -> PrefillDelayer | None:
        """As the options say; None: nothing is held back."""
        if not config.enable_prefill_delayer:
            return None
        return PrefillDelayer(
            max_delay_passes=config.prefill_delayer_max_delay_passes,
            token_usage_low_watermark=config.prefill_delayer_token_usage_low_watermark,
        )

    def __init__(
        self, *, max_delay_passes: int, token_usage_low_watermark: float | None = None
    ) -> None:
        self._max_delay_passes = max_delay_passes
        self._low_watermark = token_usage_low_watermark
        self._num_passes = 0

    def holds_back(self, *, num_running: int, fills_a_step: bool, token_usage: float) -> bool:
        """Whether this step admits no request. Called once for each step with waiting requests.

        fills_a_step  whether the waiting requests need all tokens or rows that the step has left
        token_usage   share of the KV pool that running requests hold, 0 to 1
        """
        is_underused = self._low_watermark is not None and token_usage < self._low_watermark
        if (
            num_running == 0
            or fills_a_step
            or is_underused
            or self._num_passes >= self._max_delay_passes
        ):
            self._num_passes = 0
            return False
        self._num_passes += 1
        return True
