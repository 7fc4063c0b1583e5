"""What is told of single tokens: hidden states and experts, for the requests that ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from sapwood.executor.expert_record import ExpertRecord
from sapwood.kernels.transfer import Download
from sapwood.layers.forward_batch import ForwardBatch
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
    record   records the choices of whole steps; None: nobody can ask for that
    layers   indices of the layers that have experts, in the order in which they compute
    num_layers, num_chosen  of the model: all its layers, and the experts of a token in each
    """

    def __init__(
        self,
        log: RouteLog,
        *,
        layers: Sequence[int],
        num_layers: int,
        num_chosen: int,
        record: ExpertRecord | None = None,
    ) -> None:
        self.log = log
        self._record = record
        self._layers = list(layers)
        self._sizes = (num_layers, num_chosen)

    @staticmethod
    def of(
        config: DecoderConfig, log: RouteLog, record: ExpertRecord | None = None
    ) -> RoutedExperts:
        """Of a model with experts."""
        experts = config.experts
        assert experts is not None, "the model has experts"
        return RoutedExperts(
            log,
            layers=config.expert_layers,
            num_layers=config.num_layers,
            num_chosen=experts.num_per_token,
            record=record,
        )

    @property
    def are_recorded(self) -> bool:
        """Whether the choices of every step are wanted."""
        return self._record is not None and self._record.is_on

    def of_step(self, batch: ForwardBatch) -> Tensor:
        """[tokens, layers, experts of a token] int32, of the step whose choices are in the log;
        zeros in layers without experts, as SGLang has them."""
        by_layer = self.log.take()
        if self._record is not None and self._record.is_on:
            self._record.add(batch, by_layer)
        chosen = torch.stack(by_layer, dim=1).to(torch.int32)
        found = chosen.new_zeros(len(batch.token_ids), *self._sizes)
        found[:, self._layers] = chosen
        return found
