"""Hidden states for the requests that ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from sapwood.kernels.transfer import Download
from sapwood.schema.step import ScheduledTokens


@dataclass(frozen=True, slots=True)
class HiddenRows:
    """Hidden states on their way to the host, [n, hidden] fp32."""

    rows: Download

    def tell(self) -> list[bytes]:
        """Wait for the hidden states; returns them little endian, one piece per token."""
        return [row.tobytes() for row in self.rows.wait().numpy().astype("<f4", copy=False)]


def wants_hidden(scheduled: Sequence[ScheduledTokens]) -> bool:
    return any(entry.num_hidden for entry in scheduled)


def kept_hidden(
    scheduled: Sequence[ScheduledTokens], hidden: Tensor, download: Callable[[Tensor], Download]
) -> dict[int, HiddenRows]:
    """The wanted rows of `hidden` [T, hidden], the step's tokens, by index in `scheduled`."""
    ends = accumulate(entry.num_new for entry in scheduled)
    return {
        index: HiddenRows(download(hidden[end - entry.num_hidden : end].float()))
        for index, (entry, end) in enumerate(zip(scheduled, ends, strict=True))
        if entry.num_hidden
    }
