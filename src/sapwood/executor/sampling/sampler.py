"""Chooses one token per row of logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sapwood.executor.rows import RowTable
from sapwood.executor.sampling.processors import LogitsProcessor
from sapwood.executor.sampling.random_numbers import uniforms
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import RowStart

NUM_CANDIDATES = 256
"""top-p and min-p look at so many of the likeliest tokens first; a flat distribution needs all."""


class Sampler:
    """Processors, then greedy or random choice; each row as if it were alone."""

    def __init__(self, rows: RowTable, processors: Sequence[LogitsProcessor]) -> None:
        self._rows = rows
        self._processors = processors

    def start(self, start: RowStart) -> None:
        for processor in self._processors:
            processor.start(start)

    def sample(self, logits: Tensor, rows: Sequence[int], num_outputs: Sequence[int]) -> Tensor:
        """logits [S, vocab], may be overwritten -> token ids [S] int64, on the logits' device.

        rows         row of each entry
        num_outputs  output tokens each had before; counts the random numbers
        """
        for processor in self._processors:
            processor.apply(logits, rows, num_outputs)
        params = [self._rows.sampling[row] for row in rows]
        chosen = logits.argmax(dim=-1)
        random = [index for index, one in enumerate(params) if not one.is_greedy]
        if random:
            seeds = self._rows.seeds[[rows[index] for index in random]]
            counters = np.array([num_outputs[index] for index in random], dtype=np.uint64)
            numbers = torch.from_numpy(uniforms(seeds, counters)).to(logits.device)
            wanted = logits if len(random) == len(params) else logits[random]
            chosen[random] = _choose(wanted.float(), [params[index] for index in random], numbers)
        token_ids: list[int] = []
        for processor in self._processors:
            token_ids = token_ids or chosen.tolist()
            processor.accept(rows, token_ids)
        return chosen


def _choose(logits: Tensor, params: Sequence[SamplingParams], numbers: Tensor) -> Tensor:
    """logits [n, vocab] fp32, numbers [n] in [0, 1) -> token ids [n].

    Filters apply in the order top-k, top-p, min-p, each to what the previous one kept.
    """
    device = logits.device
    temperature = torch.tensor([one.temperature for one in params], device=device)
    probs = torch.softmax(logits / temperature[:, None], dim=-1)
    filtered = [
        index
        for index, one in enumerate(params)
        if one.top_k != -1 or one.top_p < 1.0 or one.min_p > 0.0
    ]
    chosen = _inverse_cdf(probs, numbers)
    if filtered:
        kept = [params[index] for index in filtered]
        chosen[filtered] = _choose_filtered(probs[filtered], kept, numbers[filtered])
    return chosen


def _choose_filtered(probs: Tensor, params: Sequence[SamplingParams], numbers: Tensor) -> Tensor:
    vocab = probs.shape[-1]
    device = probs.device
    top_k = torch.tensor([vocab if one.top_k == -1 else min(one.top_k, vocab) for one in params])
    top_p = torch.tensor([one.top_p for one in params], device=device)
    min_p = torch.tensor([one.min_p for one in params], device=device)
    num = min(NUM_CANDIDATES, vocab)
    values, ids = probs.topk(num, dim=-1)
    # Enough candidates if each row's filters cut within them.
    mass = values.sum(dim=-1)
    cut = (top_k.to(device) <= num) | (top_p < mass) | (values[:, -1] < min_p * values[:, 0])
    if num < vocab and not bool(cut.all()):
        values, ids = probs.sort(dim=-1, descending=True, stable=True)
        num = vocab
    top_k = top_k.to(device)[:, None]
    values = values * (torch.arange(num, device=device) < top_k)
    # Without top-k the whole vocabulary's mass is 1, whether or not it is among the candidates.
    total = torch.where(top_k == vocab, 1.0, values.sum(dim=-1, keepdim=True))
    before = values.cumsum(dim=-1) - values
    values = values * (before < top_p[:, None] * total)
    values = values * (values >= min_p[:, None] * values[:, :1])
    return ids.gather(-1, _inverse_cdf(values, numbers)[:, None])[:, 0]


def _inverse_cdf(weights: Tensor, numbers: Tensor) -> Tensor:
    """weights [n, m] >= 0, not normalised; numbers [n] in [0, 1) -> index [n], weight positive."""
    sums = weights.double().cumsum(dim=-1)
    targets = numbers[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, targets, right=True)[:, 0].clamp(max=weights.shape[-1] - 1)
