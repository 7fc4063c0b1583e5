"""Drawing tokens with torch: the likeliest candidates first, the whole vocabulary where needed."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.kernels.draws import Draws

NUM_CANDIDATES = 256
"""top-p and min-p look at so many of the likeliest tokens first; a flat distribution needs all."""


def sample(logits: Tensor, draws: Draws) -> Tensor:
    """As Kernels.sample."""
    device = logits.device
    temperature = torch.tensor(draws.temperature, device=device)
    numbers = torch.tensor(draws.numbers, dtype=torch.float64, device=device)
    probs = torch.softmax(logits.float() / temperature[:, None], dim=-1)
    filters = zip(draws.top_k, draws.top_p, draws.min_p, strict=True)
    filtered = [i for i, (k, p, m) in enumerate(filters) if k != -1 or p < 1.0 or m > 0.0]
    chosen = _inverse_cdf(probs, numbers)
    if filtered:
        kept = Draws(
            temperature=[draws.temperature[i] for i in filtered],
            top_k=[draws.top_k[i] for i in filtered],
            top_p=[draws.top_p[i] for i in filtered],
            min_p=[draws.min_p[i] for i in filtered],
            numbers=[draws.numbers[i] for i in filtered],
        )
        chosen[filtered] = _choose_filtered(probs[filtered], kept, numbers[filtered])
    return chosen


def _choose_filtered(probs: Tensor, draws: Draws, numbers: Tensor) -> Tensor:
    vocab = probs.shape[-1]
    device = probs.device
    top_k = torch.tensor([vocab if k == -1 else min(k, vocab) for k in draws.top_k])
    top_p = torch.tensor(draws.top_p, device=device)
    min_p = torch.tensor(draws.min_p, device=device)
    num = min(NUM_CANDIDATES, vocab)
    values, ids = probs.topk(num, dim=-1)
    # Enough candidates if each row's filters cut within them.
    mass = values.sum(dim=-1)
    top_k = top_k.to(device)
    # With top-k, top-p is a share of the mass of all k, not of that of the candidates.
    whole = (top_k == vocab) | (top_p >= 1.0)
    by_mass = (top_p < mass) | (values[:, -1] < min_p * values[:, 0])
    cut = (top_k <= num) | (whole & by_mass)
    if num < vocab and not bool(cut.all()):
        values, ids = probs.sort(dim=-1, descending=True, stable=True)
        num = vocab
    top_k = top_k[:, None]
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
