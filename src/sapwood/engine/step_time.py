"""How many prompt tokens a step may compute while other requests decode: what fits into a time.

Each decoding request gets its next token at the end of a step, so a long prompt in the same step
makes all of them wait. How long is a matter of the machine: 1,024 tokens take 20 ms here and five
seconds there. So the number follows from the steps before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from statistics import mean

from sapwood.base.clock import Clock
from sapwood.engine.request_state import RequestState

FIRST_TOKENS = 256
"""Until a step with a prompt was measured."""
TILE = 64
"""Tokens of a chunk are a multiple of this: kernels take rows in tiles."""
NUM_KEPT = 3
"""Measurements that count, the dearest of prompts: later chunks cost more than the first."""


class StepTimeTarget:
    """Measures steps, and shares a step's time out.

    target_s  seconds that a step may take while some request decodes; 0: as long as it takes
    """

    def __init__(self, target_s: float, clock: Clock) -> None:
        self._target_s = target_s
        self._clock = clock
        self._begun: dict[int, tuple[float, int, int]] = {}
        self._last_end_s = 0.0
        self._decode_s: deque[float] = deque(maxlen=NUM_KEPT)
        self._token_s: deque[float] = deque(maxlen=NUM_KEPT)

    def begin(self, step: int, shares: Sequence[tuple[RequestState, int]]) -> None:
        """That step begins now, or after those in flight.

        shares  its requests, each with the number of its new tokens
        """
        if self._target_s:
            num_decodes = _num_decodes(state for state, _ in shares)
            num_prompt_tokens = sum(num_new for _, num_new in shares) - num_decodes
            self._begun[step] = self._clock.now_s(), num_decodes, num_prompt_tokens

    def end(self, step: int, encoding_s: float = 0.0) -> None:
        """The result of that step is there; steps end in their order.

        encoding_s  of its time, which was for pictures and says nothing about tokens"""
        if not self._target_s:
            return
        begin_s, num_decodes, num_prompt_tokens = self._begun.pop(step)
        now_s = self._clock.now_s()
        seconds = now_s - max(begin_s, self._last_end_s) - encoding_s
        self._last_end_s = now_s
        if seconds <= 0.0:  # the clock is too coarse
            return
        if num_prompt_tokens >= TILE:
            beside_s = mean(self._decode_s) if num_decodes and self._decode_s else 0.0
            self._token_s.append(max(seconds - beside_s, 0.0) / num_prompt_tokens)
        elif num_decodes:
            self._decode_s.append(seconds)

    def budget(self, running: Iterable[RequestState], most: int) -> int:
        """New tokens of the next step, `most` at most: one of each request that decodes, and of
        prompts what the time allows."""
        num_decodes = _num_decodes(running)
        if not self._target_s or not num_decodes:
            return most
        return min(most, num_decodes + self._most_prompt_tokens())

    def _most_prompt_tokens(self) -> int:
        token_s = max(self._token_s, default=0.0)
        if not token_s:
            return FIRST_TOKENS
        left_s = self._target_s - (mean(self._decode_s) if self._decode_s else 0.0)
        # Never none: a prompt must get on, however slow the decodes are.
        return max(int(left_s / token_s) // TILE, 1) * TILE


def _num_decodes(states: Iterable[RequestState]) -> int:
    return sum(state.num_missing_tokens == 1 for state in states)
