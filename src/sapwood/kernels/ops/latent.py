"""Latent attention: its rows, attention over all or over chosen ones, and products per head."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.packed import PackedHeads


class LatentOps(Protocol):
    """See `Kernels` (kernels/interface.py) for what the letters of the shapes stand for."""

    def norm_rope_write_latent(
        self,
        q: Tensor,
        latent: Tensor,
        *,
        norm: Tensor,
        eps: float,
        cos_sin: Tensor,
        positions: Tensor,
        cache: Tensor,
        write_index: Tensor,
    ) -> None:
        """The rotation of queries, and the write of rows of latent attention, in one pass.

        q            [T, Hq, N + P], where Hq may be 0; the last P entries of each head are rotated
                     in place
        latent       [T, C + P]: C entries that get an RMSNorm, then P that are rotated. It may be
                     some of the columns of a wider tensor
        norm         [C], where C may be 0
        cos_sin      [max_positions, rotary_dim] fp32, rotary_dim <= P, as in qk_norm_rope_write_kv
        positions    [T] int64
        cache        [num_pages, 1, page_size, C + P], or in 8 bits; written at write_index [T]
        Source: DeepSeek-AI 2024, arXiv:2405.04434."""
        ...

    def latent_attention(
        self, q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, rank: int
    ) -> Tensor:
        """Causal attention of new tokens over paged rows, in the absorbed form (kernels/latent).

        All heads read the same rows: a row is the key, and its first `rank` entries are the value.

        q [T, Hq, D], cache [num_pages, 1, page_size, D], or in 8 bits -> [T, Hq, rank]; softmax in
        fp32. Source: DeepSeek-AI 2024, arXiv:2405.04434."""
        ...

    def choose_keys(
        self, q: Tensor, weights: Tensor, cache: Tensor, batch: AttentionBatch, num_chosen: int
    ) -> Tensor:
        """The keys with the highest scores of those that each new token sees: the sum over heads
        of weight * relu(q * key), in fp32.

        q        [T, H, D]; weights [T, H] fp32
        cache    [num_pages, 1, page_size, D], or in 8 bits: a key per token
        Returns  [T, num_chosen] int64: positions in the token's request, ascending; then -1, where
                 the token sees fewer
        Source: DeepSeek-AI 2025, DeepSeek-V3.2-Exp."""
        ...

    def sparse_latent_attention(
        self,
        q: Tensor,
        cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        rank: int,
        chosen: Tensor,
    ) -> Tensor:
        """As latent_attention, of each token to the rows at `chosen` alone, as choose_keys has
        them. Source: as there."""
        ...

    def pack_heads(self, weight: Tensor) -> PackedHeads:
        """weight [Hq, out, in] -> a linear layer of each head, packed once."""
        ...
