"""The parts of a model, from which an implementation can build a step that is a single call."""

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
    scale      factor of the attention scores
    num_ranks  ranks that share the model; the outputs of o and down are summed over all ranks
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

        The first three arguments are [T]; all indices are int64 and contiguous. The result is
        bitwise that of the single ops. Until the next step the caller may keep it and write to it.
        Raises IndexError, before anything is written, if an index is outside its table.
        """
        ...
