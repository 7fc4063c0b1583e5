"""What a model says of itself so that an implementation can run its whole step in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sapwood.kernels.interface import AttentionBatch, PackedLinear


class CannotRecord(Exception):
    """These kernels cannot run this model's step in one call; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """One decoder layer: norms [hidden], and packed linear layers.

    qkv             hidden -> (Hq + 2 Hk) * D
    q_norm, k_norm  [D] or None
    o               Hq * D -> hidden
    gate_up         hidden -> 2 * I: the gate's outputs first
    down            I -> hidden
    """

    input_norm: Tensor
    qkv: PackedLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: PackedLinear
    post_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderParts:
    """x + attention(norm(x)), then x + down(silu(gate) * up) of norm(x), layer by layer.

    dtype      of activations, norms and dense caches
    embedding  [vocab, hidden] of this dtype, or narrower
    lm_head    hidden -> vocab, of rows after final_norm [hidden]
    cos_sin    [max_positions, rotary_dim] fp32, as in Kernels.qk_norm_rope_write_kv
    scale      of the attention scores
    num_ranks  ranks that share the model; with several, o and down are summed over them
    """

    dtype: torch.dtype
    embedding: Tensor
    layers: Sequence[LayerParts]
    final_norm: Tensor
    lm_head: PackedLinear
    cos_sin: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    scale: float
    num_ranks: int = 1


class RecordedStep(Protocol):
    """A model's step as one call. It keeps the weights and the KV caches alive."""

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        write_index: Tensor,
        batch: AttentionBatch,
        logits_index: Tensor,
    ) -> Tensor:
        """Logits [S, vocab] in fp32 of the rows at logits_index [S]; writes every layer's KV.

        The first three are [T]; all are int64 and contiguous. Exactly what the ops give one by one.
        They are the caller's, also to write to, until the next step.
        Raises IndexError if one of them holds an index outside its table; nothing is written then.
        """
        ...
