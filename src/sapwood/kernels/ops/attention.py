"""Attention over cached keys and values, the writes of them, and attention to whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from sapwood.kernels.attention_batch import PLAIN, AttentionBatch, AttentionTraits
from sapwood.kernels.texts import EqualTexts


class AttentionOps(Protocol):
    """See `Kernels` (kernels/interface.py) for what the letters of the shapes stand for."""

    def qk_norm_rope_write_kv(
        self,
        qkv: Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        cos_sin: Tensor,
        positions: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        write_index: Tensor,
    ) -> Tensor:
        """Optional RMSNorm of each q and k head, rotary embedding, and the KV write, in one pass.

        qkv          [T, (Hq + 2 Hk) * D]: q heads, then k heads, then v heads; may be overwritten.
                     Hk may be 0, with caches that have no heads: nothing is written then
        q_norm       [D] or None (Qwen3's norm over each head); k_norm likewise
        cos_sin      [max_positions, rotary_dim] fp32: cos in the first half, sin in the second;
                     rotates the first rotary_dim entries of a head, halves paired (NeoX style)
        positions    [T] int64
        key_cache    [num_pages, Hk, page_size, D], or in 8 bits; written at write_index [T] int64
        Returns      q [T, Hq, D]
        Source: Su et al. 2021, arXiv:2104.09864."""
        ...

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        traits: AttentionTraits = PLAIN,
    ) -> Tensor:
        """Causal attention of new tokens over paged keys and values.

        q [T, Hq, D] -> [T, Hq, D]; softmax in fp32. Hq is a multiple of Hk (grouped queries).
        `Need.attention` names the traits of a model, so that kernels are chosen that have them.
        With a window, keys before it are not read, and the work per token is that of the window.
        Source: Kwon et al. 2023, arXiv:2309.06180."""
        ...

    def bidirectional_attention(
        self, q: Tensor, k: Tensor, v: Tensor, texts: Sequence[EqualTexts], scale: float
    ) -> Tensor:
        """Attention of every token to all tokens of its text, without a cache.

        q, k, v [T, H, D] -> [T, H, D]; `texts` are all texts of the step (`group_texts`).
        Source: Vaswani et al. 2017, arXiv:1706.03762."""
        ...
