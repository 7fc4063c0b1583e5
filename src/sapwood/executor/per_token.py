"""What is told of single tokens: hidden states and experts, for the requests that ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from sapwood.kernels.transfer import Download
from sapwood.layers.routes import RouteLog
from sapwood.models.config import DecoderConfig
from sapwood.schema.step import ScheduledTokens

EXPERT_BYTES = 4
"""Of the number of an expert, when it is told."""


@dataclass(frozen=True, slots=True)
class ToldRows:
    """Rows on their way to the host, [n, …]: one per token.

    moves  (from, to) of right drafts of a tree, counted from the first of the last `num_drafts`
           rows: they come first when they are told
    """

    rows: Download
    moves: Sequence[tuple[int, int]] = ()
    num_drafts: int = 0

    def tell(self) -> list[bytes]:
        """Wait for the rows; returns them little endian, one piece per token."""
        rows = self.rows.wait().numpy()
        told = [row.tobytes() for row in rows.astype(rows.dtype.newbyteorder("<"), copy=False)]
        first = len(told) - self.num_drafts
        for source, to in self.moves:
            told[first + to] = told[first + source]
        return told


def kept_rows(
    scheduled: Sequence[ScheduledTokens],
    counts: Sequence[int],
    rows: Tensor,
    download: Callable[[Tensor], Download],
) -> dict[int, ToldRows]:
    """The wanted rows, by index in `scheduled`.

    counts  per entry: number of its tokens, counted from the end, whose rows are wanted
    rows    [T, …], of the step's tokens
    """
    ends = accumulate(entry.num_new for entry in scheduled)
    return {
        index: ToldRows(download(rows[end - count : end]))
        for index, (count, end) in enumerate(zip(counts, ends, strict=True))
        if count
    }


class RoutedExperts:
    """The experts that compute each token, in all layers.

    log      of the model's routers
    layers   indices of the layers that have experts, in the order in which they compute
    num_layers, num_chosen  of the model: all its layers, and the experts of a token in each
    """

    def __init__(
        self, log: RouteLog, *, layers: Sequence[int], num_layers: int, num_chosen: int
    ) -> None:
        self.log = log
        self._layers = list(layers)
        self._sizes = (num_layers, num_chosen)

    @staticmethod
    def of(config: DecoderConfig, log: RouteLog) -> RoutedExperts:
        """Of a model with experts."""
        experts = config.experts
        assert experts is not None, "the model has experts"
        return RoutedExperts(
            log,
            layers=[at for at in range(config.num_layers) if at not in experts.dense_layers],
            num_layers=config.num_layers,
            num_chosen=experts.num_per_token,
        )

    def of_step(self, num_tokens: int) -> Tensor:
        """[num_tokens, layers, experts of a token] int32, of the step whose choices are in the log;
        zeros in layers without experts, as SGLang has them."""
        chosen = torch.stack(self.log.take(), dim=1).to(torch.int32)
        found = chosen.new_zeros(num_tokens, *self._sizes)
        found[:, self._layers] = chosen
        return found
