"""TritonKernels: the ops on an NVIDIA GPU.

No op waits for the device. Arguments from the host are sent from pinned memory; everything else is
on the device already, so that a step can be captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.attention_batch import PLAIN, AttentionBatch, AttentionTraits, CapturedSharing
from sapwood.kernels.coded import LinearPart
from sapwood.kernels.low_rank import AdapterRoom, CapturedAdapters, LowRankLayer
from sapwood.kernels.packed import PackedExperts, PackedHeads, PackedLinear
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.kernels.recording import CannotRecord, Program, RecordedStep
from sapwood.kernels.reference.quantized import quantize
from sapwood.kernels.routing import Routing
from sapwood.kernels.sampling_settings import SamplingSettings
from sapwood.kernels.state_forms import DeltaForm, GatedNormForm
from sapwood.kernels.state_space import StateSpace
from sapwood.kernels.texts import EqualTexts
from sapwood.kernels.torch_ops.activations import xielu
from sapwood.kernels.torch_ops.bidirectional import bidirectional_attention
from sapwood.kernels.torch_ops.experts import activation_of
from sapwood.kernels.torch_ops.latent import HeadProducts, norm_rope_write_latent
from sapwood.kernels.torch_ops.ops import TorchKernels
from sapwood.kernels.torch_ops.rotations import norm_rotate_heads
from sapwood.kernels.torch_ops.routing import route
from sapwood.kernels.torch_ops.rows import copy_rows, gate_rows, soft_cap
from sapwood.kernels.triton import (
    convolution,
    delta_rule,
    elementwise,
    indexer,
    latent,
    norms,
    rope,
    sampling,
    state_space,
)
from sapwood.kernels.triton.attention import PagedAttention
from sapwood.kernels.triton.attention_shared_tiles import CapturedTiles
from sapwood.kernels.triton.attention_sizes import FIXED_CHUNK
from sapwood.kernels.triton.carrying import carry_rows
from sapwood.kernels.triton.experts import pack_experts
from sapwood.kernels.triton.linear import DenseLinear, quantized_linear
from sapwood.kernels.triton.logits import argmax, mask_logits, penalise
from sapwood.kernels.triton.low_rank import TritonCapturedAdapters, TritonLowRank
from sapwood.kernels.triton.tiles import TileChoice

paged_attention = PagedAttention()
_TORCH = TorchKernels()


class TritonKernels:
    """kernels/triton/factory.py says where they can serve. Dense products are cuBLAS's; routing and
    the ops of encoders are torch's."""

    name = "triton"
    multiplies_quantized = True
    can_be_captured = True
    captures_experts = True
    isa = ""

    def __init__(self) -> None:
        self._tiles = TileChoice()

    def embedding(
        self, token_ids: Tensor, weight: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        return elementwise.embedding(token_ids, weight).to(dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norms.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return norms.add_rms_norm(x, residual, weight, eps)

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
        return rope.qk_norm_rope_write_kv(
            qkv,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
            cos_sin=cos_sin,
            positions=positions,
            key_cache=key_cache,
            value_cache=value_cache,
            write_index=write_index,
        )

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        traits: AttentionTraits = PLAIN,
    ) -> Tensor:
        chunk = FIXED_CHUNK if self._tiles.fixed else None
        return paged_attention(q, key_cache, value_cache, batch, scale, traits, chunk)

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
        norm_rope_write_latent(
            q,
            latent,
            norm=norm,
            eps=eps,
            cos_sin=cos_sin,
            positions=positions,
            cache=cache,
            write_index=write_index,
        )

    def latent_attention(
        self, q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, rank: int
    ) -> Tensor:
        return latent.latent_attention(q, cache, batch, scale, rank)

    def choose_keys(
        self, q: Tensor, weights: Tensor, cache: Tensor, batch: AttentionBatch, num_chosen: int
    ) -> Tensor:
        return indexer.choose_keys(q, weights, cache, batch, num_chosen)

    def sparse_latent_attention(
        self,
        q: Tensor,
        cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        rank: int,
        chosen: Tensor,
    ) -> Tensor:
        return latent.latent_attention(q, cache, batch, scale, rank, chosen)

    def pack_heads(self, weight: Tensor) -> PackedHeads:
        return HeadProducts(weight)

    def bidirectional_attention(
        self, q: Tensor, k: Tensor, v: Tensor, texts: Sequence[EqualTexts], scale: float
    ) -> Tensor:
        return bidirectional_attention(q, k, v, texts, scale)

    def norm_rotate_heads(
        self, x: Tensor, norm: Tensor | None, eps: float, rotations: Tensor | None, out: Tensor
    ) -> None:
        norm_rotate_heads(x, norm, eps, rotations, out)

    def layer_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        return norms.layer_norm(x, weight, bias, eps)

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        return elementwise.activate(x, activation)

    def add_to(self, x: Tensor, total: Tensor) -> None:
        total.add_(x)

    def xielu(self, x: Tensor, above: float, below: float) -> Tensor:
        return xielu(x, above, below)

    def activate_and_mul(self, x: Tensor, activation: Activation) -> Tensor:
        return elementwise.activate_and_mul(x, activation)

    def causal_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        states: Tensor,
        slots: Tensor,
        batch: AttentionBatch,
        *,
        silu: bool = False,
    ) -> Tensor:
        return convolution.causal_conv(x, weight, bias, states, slots, batch, silu=silu)

    def gated_rms_norm(
        self, x: Tensor, gate: Tensor, weight: Tensor, form: GatedNormForm
    ) -> Tensor:
        return norms.gated_rms_norm(x, gate, weight, form)

    def gated_delta_rule(
        self,
        qkv: Tensor,
        decay: Tensor,
        write: Tensor,
        form: DeltaForm,
        states: Tensor,
        slots: Tensor,
        batch: AttentionBatch,
    ) -> Tensor:
        return delta_rule.gated_delta_rule(qkv, decay, write, form, states, slots, batch)

    def selective_scan(
        self,
        x: Tensor,
        b: Tensor,
        c: Tensor,
        dt: Tensor | None,
        layer: StateSpace,
        states: Tensor,
        slots: Tensor,
        batch: AttentionBatch,
        *,
        gate: Tensor | None = None,
    ) -> Tensor:
        return state_space.selective_scan(x, b, c, dt, layer, states, slots, batch, gate=gate)

    def carry_rows(
        self, source: Tensor, target: Tensor, from_rows: Sequence[int], to_rows: Sequence[int]
    ) -> None:
        carry_rows(source, target, from_rows, to_rows)

    def copy_rows(self, tensor: Tensor, source: Tensor, target: Tensor) -> None:
        copy_rows(tensor, source, target)

    def gate_rows(self, x: Tensor, gate: Tensor) -> None:
        gate_rows(x, gate)

    def gate_columns(self, x: Tensor, gate: Tensor) -> None:
        gate_rows(x, gate)

    def route(self, logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
        return route(logits, bias, routing)

    def pack_experts(
        self,
        gate_up: Sequence[PackedLinear],
        down: Sequence[PackedLinear],
        activation: Activation,
        limit: float | None = None,
        *,
        gated: bool = True,
    ) -> PackedExperts:
        activate = activation_of(self, activation, limit, gated=gated)
        return pack_experts(gate_up, down, activate, self._tiles)

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> PackedLinear:
        return DenseLinear(weight.to(dtype), bias, self._tiles)

    def pack_quantized_linear(
        self, parts: Sequence[LinearPart], bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear:
        return quantized_linear(parts, bias, self._tiles)

    def low_rank(self, in_size: int, out_size: int) -> LowRankLayer:
        return TritonLowRank(in_size, out_size)

    def quantize_weight(self, weight: Tensor, kind: str) -> QuantizedWeight:
        return quantize(weight, kind)

    def argmax(self, logits: Tensor) -> Tensor:
        return argmax(logits)

    def mask_logits(self, logits: Tensor, masks: Tensor, rows: Sequence[int]) -> None:
        mask_logits(logits, masks, rows)

    def soft_cap(self, logits: Tensor, cap: float) -> None:
        soft_cap(logits, cap)

    def penalise(
        self,
        logits: Tensor,
        ids: Tensor,
        counts: Tensor,
        *,
        repetition: float,
        frequency: float,
        presence: float,
    ) -> None:
        penalise(logits, ids, counts, repetition=repetition, frequency=frequency, presence=presence)

    def sample(self, logits: Tensor, settings: SamplingSettings) -> Tensor:
        return sampling.sample(logits, settings)

    def sample_with(self, logits: Tensor, table: Tensor) -> Tensor:
        return sampling.sample_with(logits, table)

    def captured_sharing(
        self, num_requests: int, page_size: int, device: torch.device
    ) -> CapturedSharing | None:
        return CapturedTiles(num_requests, page_size, device)

    def captured_adapters(
        self, room: AdapterRoom, dtype: torch.dtype, device: torch.device
    ) -> CapturedAdapters:
        return TritonCapturedAdapters(room, dtype, device)

    def record(
        self,
        program: Program,
        kv_caches: Sequence[tuple[Tensor, ...]],
        group_of_layer: Sequence[int] = (),
    ) -> RecordedStep:
        raise CannotRecord("steps are captured as CUDA graphs, not recorded as one call")

    def set_num_threads(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)

    @property
    def exact_products(self) -> bool:
        return self._tiles.fixed

    def set_exact_products(self, exact: bool) -> None:
        self._tiles.fixed = exact
