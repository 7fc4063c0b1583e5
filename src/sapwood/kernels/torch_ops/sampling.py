"""Drawing tokens with torch: the likeliest candidates first, the whole vocabulary where needed.

The vocabulary is never sorted. A filter keeps the entries above some probability; the bits of
positive fp32 numbers order them as the numbers do, so that this probability is found by two
histograms, of the upper and then of the lower 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.kernels.sampling_settings import SamplingSettings

NUM_CANDIDATES = 256
"""Likeliest tokens at which top-p and min-p look first; a flat distribution needs all tokens."""

_HALF_BITS = 16
_BINS = 1 << _HALF_BITS


def sample(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """As Kernels.sample."""
    device = logits.device
    temperature = torch.tensor(settings.temperature, device=device)
    numbers = torch.tensor(settings.numbers, dtype=torch.float64, device=device)
    probs = torch.softmax(logits.float() / temperature[:, None], dim=-1)
    filtered = _with_filters(settings)
    chosen = inverse_cdf(probs, numbers)
    if filtered:
        kept = _some(settings, filtered)
        chosen[filtered] = _choose_filtered(probs[filtered], kept, numbers[filtered])
    return chosen


def kept_probabilities(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """logits [S, vocab] -> [S, vocab] fp64: the distributions from which `sample` draws; 0 for
    what the filters drop."""
    temperature = torch.tensor(settings.temperature, device=logits.device)
    probs = torch.softmax(logits.float() / temperature[:, None], dim=-1)
    filtered = _with_filters(settings)
    if filtered:
        probs[filtered] = _kept(probs[filtered], _some(settings, filtered))
    return probs.double() / probs.sum(dim=-1, keepdim=True, dtype=torch.float64)


def _kept(probs: Tensor, settings: SamplingSettings) -> Tensor:
    """probs [n, vocab] of rows with filters -> the same, 0 for what is dropped."""
    values, ids, far = _candidates(probs, settings)
    kept = torch.zeros_like(probs).scatter_(-1, ids, _filtered(values, settings))
    for i in far:
        k = settings.top_k[i]
        if 0 < k < probs.shape[-1]:
            values, ids = probs[i : i + 1].topk(k, dim=-1)
            kept[i] = torch.zeros_like(probs[i]).index_copy_(
                0, ids[0], _filtered(values, _some(settings, [i]))[0]
            )
        else:
            kept[i] = _cut(probs[i], settings.top_p[i], settings.min_p[i])
    return kept


def _with_filters(settings: SamplingSettings) -> list[int]:
    filters = zip(settings.top_k, settings.top_p, settings.min_p, strict=True)
    return [i for i, (k, p, m) in enumerate(filters) if k != -1 or p < 1.0 or m > 0.0]


def _choose_filtered(probs: Tensor, settings: SamplingSettings, numbers: Tensor) -> Tensor:
    """Choose tokens among the candidates, for rows whose filters cut within these, or among all."""
    vocab = probs.shape[-1]
    values, ids, far = _candidates(probs, settings)
    chosen = ids.gather(-1, inverse_cdf(_filtered(values, settings), numbers)[:, None])[:, 0]
    for i in far:
        # Alone, so that its token does not depend on how many candidates another row needs.
        alone, number = _some(settings, [i]), numbers[i : i + 1]
        if 0 < settings.top_k[i] < vocab:
            values, ids = probs[i : i + 1].topk(settings.top_k[i], dim=-1)
            chosen[i] = ids[0, inverse_cdf(_filtered(values, alone), number)]
        else:
            chosen[i] = inverse_cdf(
                _cut(probs[i], settings.top_p[i], settings.min_p[i])[None], number
            )
    return chosen


def _candidates(probs: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor, list[int]]:
    """(probabilities and ids [n, num] of the likeliest, likeliest first; the rows whose filters
    keep more tokens than these)"""
    vocab = probs.shape[-1]
    num = min(NUM_CANDIDATES, vocab)
    values, ids = probs.topk(num, dim=-1)
    mass = values.sum(dim=-1).tolist()
    least = (values[:, -1] / values[:, 0]).tolist()
    far: list[int] = []
    for i, (k, p, m) in enumerate(zip(settings.top_k, settings.top_p, settings.min_p, strict=True)):
        # With top-k, top-p is a share of the mass of all k, not of that of the candidates.
        is_whole = k == -1 or k >= vocab or p >= 1.0
        if not (0 < k <= num or num == vocab or (is_whole and (p < mass[i] or least[i] < m))):
            far.append(i)
    return values, ids, far


def _filtered(values: Tensor, settings: SamplingSettings) -> Tensor:
    """values [n, num] of the likeliest, likeliest first -> the same, 0 for what is dropped."""
    num = values.shape[-1]
    device = values.device
    is_whole = torch.tensor([k == -1 for k in settings.top_k], device=device)[:, None]
    top_k = torch.tensor([num if k == -1 else min(k, num) for k in settings.top_k], device=device)
    top_p = torch.tensor(settings.top_p, device=device)[:, None]
    min_p = torch.tensor(settings.min_p, device=device)[:, None]
    values = values * (torch.arange(num, device=device) < top_k[:, None])
    # Without top-k the whole vocabulary's mass is 1, whether or not it is among the candidates.
    total = torch.where(is_whole, 1.0, values.sum(dim=-1, keepdim=True))
    before = values.cumsum(dim=-1) - values
    values = values * (before < top_p * total)
    return values * (values >= min_p * values[:, :1])


def _cut(probs: Tensor, top_p: float, min_p: float) -> Tensor:
    """probs [vocab] -> the same, 0 for what is dropped; over the whole vocabulary."""
    kept = probs if top_p >= 1.0 else _first(probs, top_p)
    return kept * (kept >= min_p * probs.amax()) if min_p > 0 else kept


def _first(probs: Tensor, share: float) -> Tensor:
    """Keep the likeliest entries of probs [vocab] up to a share of the mass; the others become 0.

    An entry is kept while the entries before it have less than that share. Equally likely entries
    are kept in the order of their ids.
    """
    bits = probs.view(torch.int32)
    upper, lower = (bits >> _HALF_BITS).long(), bits & (_BINS - 1)
    missing = share * probs.sum(dtype=torch.float64)
    upper_bin, missing = _bin_that_reaches(upper, probs.double(), missing)
    inside = (upper == upper_bin).nonzero()[:, 0]
    lower_bin, missing = _bin_that_reaches(lower[inside].long(), probs[inside].double(), missing)
    edge = (upper_bin << _HALF_BITS) | lower_bin
    at_edge = inside[lower[inside] == lower_bin]
    before = torch.arange(len(at_edge), device=probs.device) * probs[at_edge].double()
    kept = probs * (bits > edge)
    some = at_edge[before < missing]
    kept[some] = probs[some]
    return kept


def _bin_that_reaches(bins: Tensor, weights: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Add up weights from the highest bin down until they reach `wanted`.

    bins     [n] int64
    weights  [n] fp64
    Returns  (the bin with which they reach it, or the lowest bin; the weight missing before it)
    """
    histogram = torch.zeros(_BINS, dtype=torch.float64, device=bins.device)
    above = histogram.index_add_(0, bins, weights).flip(0).cumsum(0)
    place = (above < wanted).sum().clamp(max=_BINS - 1)
    before = torch.where(place > 0, above[(place - 1).clamp(min=0)], 0.0)
    return _BINS - 1 - place, wanted - before


def _some(settings: SamplingSettings, which: list[int]) -> SamplingSettings:
    return SamplingSettings(
        temperature=[settings.temperature[i] for i in which],
        top_k=[settings.top_k[i] for i in which],
        top_p=[settings.top_p[i] for i in which],
        min_p=[settings.min_p[i] for i in which],
        numbers=[settings.numbers[i] for i in which],
    )


def inverse_cdf(weights: Tensor, numbers: Tensor) -> Tensor:
    """weights [n, m] >= 0, not normalised; numbers [n] in [0, 1) -> index [n], weight positive."""
    sums = weights.double().cumsum(dim=-1)
    targets = numbers[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, targets, right=True)[:, 0].clamp(max=weights.shape[-1] - 1)
