"""Kernels whose steps can be captured: as those of a GPU, they read a step of decodes from its
tensors alone. They compute with torch, and read all pages that a table has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.attention_batch import PLAIN, AttentionBatch, AttentionTraits
from sapwood.kernels.packed import PackedExperts, PackedLinear
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.kernels.torch_ops.experts import activation_of, check_experts


class DeviceStyle(TorchKernels):
    can_be_captured = True
    captures_experts = True
    isa = ""

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        traits: AttentionTraits = PLAIN,
    ) -> Tensor:
        if batch.num_decodes != len(batch.query_lens):
            return super().paged_attention(q, key_cache, value_cache, batch, scale, traits)
        num, heads, head_dim = q.shape
        keys, values = (
            pool[table_of(batch)].transpose(2, 3).flatten(1, 2).transpose(1, 2)
            for pool in (key_cache, value_cache)
        )  # [requests, Hk, tokens, D]
        hidden = is_hidden(batch, keys.shape[2], traits.window)[:, None, :, None]
        keys, values = keys.masked_fill(hidden, 0.0), values.masked_fill(hidden, 0.0)
        grouped = q.view(num, keys.shape[1], -1, head_dim)
        scores = grouped @ keys.transpose(2, 3) * scale
        if traits.soft_cap is not None:
            scores = traits.soft_cap * torch.tanh(scores / traits.soft_cap)
        if traits.alibi is not None:
            behind = torch.arange(keys.shape[2]) - (batch.context_len - 1)[:, None]
            scores = scores + traits.alibi.view(keys.shape[1], -1, 1) * behind[:, None, None]
        scores = scores.masked_fill(hidden.transpose(2, 3), -torch.inf)
        if traits.sinks is not None:
            sinks = traits.sinks.view(keys.shape[1], -1, 1).expand(num, -1, -1, -1)
            scores = torch.cat((scores, sinks), dim=-1)
        shares = scores.softmax(-1)[..., : keys.shape[2]]
        return (shares @ values).reshape(num, heads, head_dim)

    def latent_attention(
        self, q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, rank: int
    ) -> Tensor:
        if batch.num_decodes != len(batch.query_lens):
            return super().latent_attention(q, cache, batch, scale, rank)
        rows = cache[table_of(batch), 0].flatten(1, 2)  # [requests, tokens, D]
        hidden = is_hidden(batch, rows.shape[1])
        rows = rows.masked_fill(hidden[:, :, None], 0.0)
        scores = (q @ rows.transpose(1, 2) * scale).masked_fill(hidden[:, None], -torch.inf)
        return scores.softmax(-1) @ rows[..., :rank]

    def choose_keys(
        self, q: Tensor, weights: Tensor, cache: Tensor, batch: AttentionBatch, num_chosen: int
    ) -> Tensor:
        if batch.num_decodes != len(batch.query_lens):
            return super().choose_keys(q, weights, cache, batch, num_chosen)
        keys = cache[table_of(batch), 0].flatten(1, 2)
        num_keys = keys.shape[1]
        hidden = is_hidden(batch, num_keys)
        scores = (q @ keys.masked_fill(hidden[:, :, None], 0.0).transpose(1, 2)).relu()
        total = (scores * weights[:, :, None]).sum(1).masked_fill(hidden, -torch.inf)
        best = total.topk(min(num_chosen, num_keys), dim=1).indices
        best = best.masked_fill(hidden.gather(1, best), num_keys).sort(dim=1).values
        best = best.masked_fill(best == num_keys, -1)
        return F.pad(best, (0, num_chosen - best.shape[1]), value=-1)

    def sparse_latent_attention(
        self,
        q: Tensor,
        cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        rank: int,
        chosen: Tensor,
    ) -> Tensor:
        if batch.num_decodes != len(batch.query_lens):
            return super().sparse_latent_attention(q, cache, batch, scale, rank, chosen)
        place = chosen.clamp(min=0)
        pages = table_of(batch).gather(1, place // cache.shape[2])
        rows = cache[pages, 0, place % cache.shape[2]]
        scores = (q @ rows.transpose(1, 2) * scale).masked_fill(chosen[:, None] < 0, -torch.inf)
        return scores.softmax(-1) @ rows[..., :rank]

    def pack_experts(
        self,
        gate_up: Sequence[PackedLinear],
        down: Sequence[PackedLinear],
        activation: Activation,
        limit: float | None = None,
        *,
        gated: bool = True,
    ) -> PackedExperts:
        check_experts(len(gate_up), len(down))
        return AllExperts(gate_up, down, activation_of(self, activation, limit, gated=gated))

    def sample_with(self, logits: Tensor, settings: Tensor) -> Tensor:
        temperature, top_k, top_p, min_p, numbers = settings[:, :, None]
        probs, ids = (logits.double() / temperature).softmax(-1).sort(descending=True, stable=True)
        rank = torch.arange(probs.shape[1])
        probs = probs.masked_fill((top_k >= 0) & (rank >= top_k), 0.0)
        before = probs.cumsum(-1) - probs
        dropped = (before >= top_p * probs.sum(-1, keepdim=True)) & (top_p < 1.0)
        probs = probs.masked_fill(dropped, 0.0)
        probs = probs.masked_fill(probs < min_p * probs[:, :1], 0.0)
        sums = probs.cumsum(-1)
        place = (sums <= numbers * sums[:, -1:]).sum(-1, keepdim=True)
        return ids.gather(1, place.clamp(max=probs.shape[1] - 1)).squeeze(1)


@dataclass(frozen=True)
class AllExperts:
    """Every expert computes every token."""

    gate_up: Sequence[PackedLinear]
    down: Sequence[PackedLinear]
    activate: Callable[[Tensor], Tensor]
    can_be_captured: bool = True

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(x.shape)
        for expert, (up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            share = (weights * (chosen == expert)).sum(dim=1, keepdim=True)
            out = out + down.fp32(self.activate(up(x))) * share
        return out.to(x.dtype)


def table_of(batch: AttentionBatch) -> Tensor:
    """[requests, max_pages] int64, computed by the first layer for the others."""
    table: Any = batch.cache.get("table")
    if table is None:
        table = batch.cache["table"] = batch.page_table.long()
    return table


def is_hidden(batch: AttentionBatch, num_tokens: int, window: int | None = None) -> Tensor:
    """[requests, num_tokens]: which keys a decode does not see."""
    position, length = torch.arange(num_tokens), batch.context_len[:, None]
    hidden = position >= length
    return hidden if window is None else hidden | (position < length - window)
