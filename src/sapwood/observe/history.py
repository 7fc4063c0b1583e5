"""The last minutes of a server in one sample per second, for the live page."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

SAMPLES = 300
PERCENTILES = (0.5, 0.95, 0.99)

Percentiles = Sequence[float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One second of a server.

    at_s        Unix time
    cache_hit_rate  cached share of the prompt tokens of this second; None: there were none
    ttft_s, itl_s   percentiles of the last minute, as PERCENTILES lists them; None: no observation
    """

    at_s: float
    num_running: int
    num_waiting: int
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    cache_hit_rate: float | None
    token_usage: float
    ttft_s: Percentiles
    itl_s: Percentiles


class History:
    """Samples are numbered from 0 on; the last SAMPLES of them are kept."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=SAMPLES)
        self._num_added = 0

    @property
    def num_added(self) -> int:
        return self._num_added

    def add(self, sample: Sample) -> None:
        self._samples.append(sample)
        self._num_added += 1

    def since(self, number: int) -> list[Sample]:
        """The samples whose number is at least `first`, as far as they are kept."""
        oldest = self._num_added - len(self._samples)
        return list(self._samples)[max(0, number - oldest) :]
