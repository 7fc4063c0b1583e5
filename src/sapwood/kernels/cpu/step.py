"""A whole step of a Llama-like decoder in one call into C++.

The same ops as a model's own forward, without Python between them: at one row, calls and result
tensors cost a tenth of a small model's step, more where memory is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.kernels.cpu import _native
from sapwood.kernels.cpu.native import (
    CpuKernels,
    Linear,
    address_of,
    check_indices,
    describe,
    dtype_of,
    page_layout,
)
from sapwood.kernels.interface import AttentionBatch, PackedLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLayer:
    """One layer's weights: norms [hidden], and linear layers packed by CpuKernels.

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
class StepModel:
    """A decoder: embedding [vocab, hidden], layers, final_norm [hidden], lm_head hidden -> vocab.

    cos_sin  [max_positions, rotary_dim] fp32, as in Kernels.qk_norm_rope_write_kv
    scale    of the attention scores
    """

    embedding: Tensor
    layers: Sequence[StepLayer]
    final_norm: Tensor
    lm_head: PackedLinear
    cos_sin: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    scale: float


class DecoderStep:
    """Keeps the model and the KV caches alive; one step at a time.

    kv_caches  per layer (keys, values), each [num_pages, Hk, page_size, D]; all of one layout
    Raises     ValueError if a weight or a cache does not fit the model
    """

    def __init__(
        self, kernels: CpuKernels, model: StepModel, kv_caches: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        self._kernels = kernels
        self._keep = (model, tuple(kv_caches))
        embedding, cos_sin = model.embedding, model.cos_sin
        self._dtype = embedding.dtype
        self._vocab, hidden = embedding.shape
        if not embedding.is_contiguous():
            raise ValueError(f"embedding {describe(embedding)} must be contiguous")
        if cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
            raise ValueError("cos_sin must be float32 and contiguous")
        if len(kv_caches) != len(model.layers):
            raise ValueError(f"{len(kv_caches)} KV caches for {len(model.layers)} layers")
        layouts = {
            tuple(
                page_layout(cache, embedding, model.num_kv_heads, model.head_dim) for cache in pair
            )
            for pair in kv_caches
        }
        if len(layouts) != 1:
            raise ValueError(f"the layers' KV caches differ in their layout: {layouts}")
        ((num_pages, page_size, key_stride), (value_pages, value_size, value_stride)) = (
            layouts.pop()
        )
        if (value_pages, value_size) != (num_pages, page_size):
            raise ValueError("the key cache and the value cache differ in their layout")
        self._shape = (model.num_heads, model.num_kv_heads, model.head_dim, page_size, num_pages)
        self._step = _native.DecoderStep(
            dtype_of(embedding), hidden, self._vocab, cos_sin.shape[0],
            model.num_heads, model.num_kv_heads, model.head_dim, cos_sin.shape[1], page_size,
            num_pages, key_stride, value_stride, model.eps, model.scale,
            embedding.data_ptr(), cos_sin.data_ptr(),
            address_of(model.final_norm, embedding, hidden, "final_norm"),
            self._linear(model.lm_head, "lm_head", self._vocab, hidden),
            [self._layer(model, i, pair) for i, pair in enumerate(kv_caches)],
        )  # fmt: skip

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        write_index: Tensor,
        batch: AttentionBatch,
        logits_index: Tensor,
    ) -> Tensor:
        """Logits [S, vocab] of the rows at logits_index [S]; writes every layer's KV.

        The first three are [T]; all are int64 and contiguous, as in ForwardBatch.
        Raises IndexError if one of them holds an index outside its table; nothing is written then.
        """
        num_tokens, num_logits = token_ids.numel(), logits_index.numel()
        check_indices(token_ids, "token_ids", num_tokens)
        check_indices(positions, "positions", num_tokens)
        check_indices(write_index, "write_index", num_tokens)
        check_indices(logits_index, "logits_index", num_logits)
        plan = self._kernels.plan(batch, self._shape)
        logits = torch.empty((num_logits, self._vocab), dtype=self._dtype)
        self._step.run(
            self._kernels.context, plan, token_ids.data_ptr(), positions.data_ptr(),
            write_index.data_ptr(), num_tokens, logits_index.data_ptr(), num_logits,
            logits.data_ptr(),
        )  # fmt: skip
        return logits

    def _layer(
        self, model: StepModel, index: int, caches: tuple[Tensor, Tensor]
    ) -> tuple[
        tuple[int, int, int, int, int, int],
        tuple[_native._Linear, _native._Linear, _native._Linear, _native._Linear],
    ]:
        """One layer's addresses, checked."""
        layer, like, head_dim = model.layers[index], model.embedding, model.head_dim
        hidden = like.shape[1]
        heads = model.num_heads * head_dim
        kv_heads = model.num_kv_heads * head_dim
        inner = layer.down.sizes[1] if isinstance(layer.down, Linear) else 0
        return (
            (
                address_of(layer.input_norm, like, hidden, "input_norm"),
                address_of(layer.q_norm, like, head_dim, "q_norm"),
                address_of(layer.k_norm, like, head_dim, "k_norm"),
                address_of(layer.post_norm, like, hidden, "post_norm"),
                caches[0].data_ptr(),
                caches[1].data_ptr(),
            ),
            (
                self._linear(layer.qkv, "qkv", heads + 2 * kv_heads, hidden),
                self._linear(layer.o, "o", hidden, heads),
                self._linear(layer.gate_up, "gate_up", 2 * inner, hidden),
                self._linear(layer.down, "down", hidden, inner),
            ),
        )

    def _linear(
        self, layer: PackedLinear, name: str, num_out: int, num_in: int
    ) -> tuple[int, int, int, int]:
        if not isinstance(layer, Linear):
            raise ValueError(f"{name} was not packed by CpuKernels but is a {type(layer).__name__}")
        if layer.sizes != (num_out, num_in) or layer.dtype != self._dtype:
            raise ValueError(
                f"{name} is {list(layer.sizes)} {layer.dtype} but must be "
                f"[{num_out}, {num_in}] {self._dtype}"
            )
        if layer.native_parts()[3] != num_in:
            raise ValueError(f"{name} has {num_in} inputs; a bf16 step needs an even number")
        return layer.native_parts()
