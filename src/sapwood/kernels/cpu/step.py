"""A whole step of a Llama-like decoder in one call into C++.

The same ops as a model's own forward, without Python between them: at one row, calls and result
tensors cost a tenth of a small model's step, more where memory is faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sapwood.kernels.cpu import _native
from sapwood.kernels.cpu.linear import Linear
from sapwood.kernels.cpu.native import CpuKernels
from sapwood.kernels.cpu.quantized import WEIGHT_KINDS, QuantizedLinear
from sapwood.kernels.cpu.tensors import (
    address_of,
    cache_layout,
    check_embedding,
    check_indices,
    dtype_of,
)
from sapwood.kernels.interface import AttentionBatch, PackedLinear
from sapwood.kernels.recording import CannotRecord, DecoderParts


class DecoderStep:
    """Keeps the model and the KV caches alive; one step at a time.

    kv_caches  per layer (keys, values), each [num_pages, Hk, page_size, D] or in 8 bits; all of one
               layout
    Raises     ValueError if a weight or a cache does not fit the model
    """

    def __init__(
        self, kernels: CpuKernels, parts: DecoderParts, kv_caches: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        if parts.num_ranks > 1:
            raise CannotRecord(f"{parts.num_ranks} ranks add their results up between its ops")
        self._kernels = kernels
        self._keep = (parts, tuple(kv_caches))
        embedding, cos_sin = parts.embedding, parts.cos_sin
        self._dtype = parts.dtype
        self._vocab, hidden = embedding.shape
        check_embedding(embedding, self._dtype)
        like = torch.empty(0, dtype=self._dtype)
        if cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
            raise ValueError("cos_sin must be float32 and contiguous")
        if len(kv_caches) != len(parts.layers):
            raise ValueError(f"{len(kv_caches)} KV caches for {len(parts.layers)} layers")
        layouts = {
            cache_layout(*pair, like, parts.num_kv_heads, parts.head_dim) for pair in kv_caches
        }
        if len(layouts) != 1:
            raise ValueError(f"the layers' KV caches differ in their layout: {layouts}")
        layout = layouts.pop()
        self._shape = (
            parts.num_heads, parts.num_kv_heads, parts.head_dim, layout.page_size, layout.num_pages
        )  # fmt: skip
        # Kept: fresh memory costs the system a fault per page, 0.5 ms per step of 32 requests.
        self._logits = torch.empty((0, self._vocab))
        self._step = _native.DecoderStep(
            dtype_of(like), hidden, self._vocab, cos_sin.shape[0],
            parts.num_heads, parts.num_kv_heads, parts.head_dim, cos_sin.shape[1],
            layout.page_size, layout.num_pages, layout.key_stride, layout.value_stride, layout.kv,
            parts.eps, parts.scale,
            WEIGHT_KINDS[embedding.dtype], embedding.data_ptr(), cos_sin.data_ptr(),
            address_of(parts.final_norm, like, hidden, "final_norm"),
            self._linear(parts.lm_head, "lm_head", self._vocab, hidden),
            [self._layer(parts, i, pair) for i, pair in enumerate(kv_caches)],
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
        if num_logits > self._logits.shape[0]:
            self._logits = torch.empty((num_logits, self._vocab))
        logits = self._logits[:num_logits]
        self._step.run(
            self._kernels.context, plan, token_ids.data_ptr(), positions.data_ptr(),
            write_index.data_ptr(), num_tokens, logits_index.data_ptr(), num_logits,
            logits.data_ptr(),
        )  # fmt: skip
        return logits

    def _layer(
        self, parts: DecoderParts, index: int, caches: tuple[Tensor, Tensor]
    ) -> tuple[
        tuple[int, int, int, int, int, int],
        tuple[
            _native.LinearWeight, _native.LinearWeight, _native.LinearWeight, _native.LinearWeight
        ],
    ]:
        """One layer's addresses, checked."""
        layer, head_dim = parts.layers[index], parts.head_dim
        hidden = parts.embedding.shape[1]
        like = torch.empty(0, dtype=self._dtype)
        heads = parts.num_heads * head_dim
        kv_heads = parts.num_kv_heads * head_dim
        inner = _native_form(layer.down, "down").sizes[1]
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
    ) -> _native.LinearWeight:
        layer = _native_form(layer, name)
        if layer.sizes != (num_out, num_in) or layer.dtype != self._dtype:
            raise ValueError(
                f"{name} is {list(layer.sizes)} {layer.dtype} but must be "
                f"[{num_out}, {num_in}] {self._dtype}"
            )
        weight = layer.native_weight
        if weight.k != num_in:
            raise CannotRecord(f"{name} has {num_in} inputs; a bf16 step needs an even number")
        return weight


def _native_form(layer: PackedLinear, name: str) -> Linear | QuantizedLinear:
    if not isinstance(layer, Linear | QuantizedLinear):
        raise CannotRecord(f"{name} is a {type(layer).__name__}, which has no native form")
    return layer
