"""TorchKernels: each op in as few torch calls as it takes.

At one row a call costs more than its arithmetic. The measured microseconds in comments are of 2
cores with AVX-512 BF16, hidden size 576."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels import kv_cache
from sapwood.kernels.activations import Activation
from sapwood.kernels.attention_batch import (
    ALIBI,
    CHOSEN_KEYS,
    LATENT,
    PLAIN,
    SINKS,
    SLIDING_WINDOW,
    SOFT_CAP,
    AttentionBatch,
    AttentionTraits,
    lacking,
)
from sapwood.kernels.coded import LinearPart
from sapwood.kernels.kv_cache import is_8_bit
from sapwood.kernels.low_rank import AdapterRoom, LowRankLayer
from sapwood.kernels.packed import PackedExperts, PackedHeads, PackedLinear
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.kernels.recording import CannotRecord, Program, RecordedStep
from sapwood.kernels.reference.quantized import quantize
from sapwood.kernels.registry import Need
from sapwood.kernels.routing import Routing
from sapwood.kernels.sampling_settings import SamplingSettings
from sapwood.kernels.state_forms import DeltaForm, GatedNormForm
from sapwood.kernels.state_space import StateSpace
from sapwood.kernels.texts import EqualTexts
from sapwood.kernels.torch_ops.activations import activate, activate_and_mul, xielu
from sapwood.kernels.torch_ops.attention import PagedAttention, first_keys
from sapwood.kernels.torch_ops.bidirectional import bidirectional_attention
from sapwood.kernels.torch_ops.convolution import causal_conv
from sapwood.kernels.torch_ops.delta_rule import gated_delta_rule
from sapwood.kernels.torch_ops.experts import Experts, activation_of
from sapwood.kernels.torch_ops.latent import (
    HeadProducts,
    choose_keys,
    norm_rope_write_latent,
    sparse_latent_attention,
)
from sapwood.kernels.torch_ops.linear import pack
from sapwood.kernels.torch_ops.low_rank import TorchLowRank
from sapwood.kernels.torch_ops.masks import mask_logits
from sapwood.kernels.torch_ops.penalties import penalise
from sapwood.kernels.torch_ops.rotations import norm_rotate_heads
from sapwood.kernels.torch_ops.routing import route
from sapwood.kernels.torch_ops.rows import (
    carry_rows,
    copy_rows,
    gate_rows,
    gated_rms_norm,
    soft_cap,
)
from sapwood.kernels.torch_ops.sampling import sample
from sapwood.kernels.torch_ops.state_space import selective_scan

_ATTENTION = frozenset({SLIDING_WINDOW, SOFT_CAP, SINKS, ALIBI, LATENT, CHOSEN_KEYS})


class TorchKernels:
    """Runs wherever torch does."""

    name = "torch"
    multiplies_quantized = False
    can_be_captured = False
    captures_experts = False
    isa = ""

    def __init__(self) -> None:
        self._attention = PagedAttention()

    @staticmethod
    def why_not(need: Need) -> str | None:
        if need.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{need.dtype} is not float32, bfloat16 or float16"
        return need.why_not_kv() or lacking(need.attention, _ATTENTION)

    def embedding(
        self, token_ids: Tensor, weight: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        return weight.index_select(0, token_ids).to(dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, width = x.shape
        if rows > 1:
            return F.rms_norm(x, (width,), weight, eps)
        # rms_norm is five calls inside, layer_norm one. The mean of [x, -x] is 0 and its variance
        # is the mean of squares of x, so its layer norm is the RMS norm: 6 us instead of 9 for one
        # row; for more rows the doubled width costs more than the calls.
        mirrored = torch.cat((x, x.neg()), dim=1)
        return F.layer_norm(mirrored, (2 * width,), eps=eps)[:, :width] * weight

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = residual.add_(x)
        return self.rms_norm(total, weight, eps), total

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
        num_rotated = num_heads + num_kv_heads
        heads = qkv.view(qkv.shape[0], num_rotated + num_kv_heads, head_dim)
        qk = heads[:, :num_rotated].float()
        if q_norm is not None or k_norm is not None:
            qk = _norm_heads(qk, num_heads, q_norm, k_norm, eps)
        qk = _rotate(qk, cos_sin.index_select(0, positions))
        if is_8_bit(key_cache.dtype):
            kv_cache.write(key_cache, write_index, qk[:, num_heads:])
            kv_cache.write(value_cache, write_index, heads[:, num_rotated:])
            return qk[:, :num_heads].to(qkv.dtype)
        page_size = key_cache.shape[2]
        where = (write_index // page_size, write_index % page_size)
        key_cache.transpose(1, 2).index_put_(where, qk[:, num_heads:].to(qkv.dtype))
        value_cache.transpose(1, 2).index_put_(where, heads[:, num_rotated:])
        return qk[:, :num_heads].to(qkv.dtype)

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        traits: AttentionTraits = PLAIN,
    ) -> Tensor:
        if not is_8_bit(key_cache.dtype):
            return self._attention(q, key_cache, value_cache, batch, scale, traits)
        pages, dense = _visible_pages(batch, key_cache.shape[2], traits.window)
        keys, values = (
            kv_cache.dequantize_pages(cache, pages, q.shape[-1], q.dtype)
            for cache in (key_cache, value_cache)
        )
        return self._attention(q, keys, values, dense, scale, traits)

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
        return self.paged_attention(q, cache, cache, batch, scale)[..., :rank]

    def choose_keys(
        self, q: Tensor, weights: Tensor, cache: Tensor, batch: AttentionBatch, num_chosen: int
    ) -> Tensor:
        return choose_keys(q, weights, cache, batch, num_chosen)

    def sparse_latent_attention(
        self,
        q: Tensor,
        cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        rank: int,
        chosen: Tensor,
    ) -> Tensor:
        return sparse_latent_attention(q, cache, batch, scale, rank, chosen)

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
        return F.layer_norm(x, x.shape[1:], weight, bias, eps)

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        return activate(x, activation)

    def add_to(self, x: Tensor, total: Tensor) -> None:
        total.add_(x)

    def xielu(self, x: Tensor, above: float, below: float) -> Tensor:
        return xielu(x, above, below)

    def activate_and_mul(self, x: Tensor, activation: Activation) -> Tensor:
        return activate_and_mul(x, activation)

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
        return causal_conv(x, weight, bias, states, slots, batch, silu=silu)

    def gated_rms_norm(
        self, x: Tensor, gate: Tensor, weight: Tensor, form: GatedNormForm
    ) -> Tensor:
        return gated_rms_norm(x, gate, weight, form)

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
        return gated_delta_rule(qkv, decay, write, form, states, slots, batch)

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
        return selective_scan(x, b, c, dt, layer, states, slots, batch, gate=gate)

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
        return Experts(gate_up, down, activation_of(self, activation, limit, gated=gated))

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> PackedLinear:
        return pack(weight.to(dtype), bias)

    def pack_quantized_linear(
        self, parts: Sequence[LinearPart], bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear:
        """Computes with dequantised weights and x as it is: as exact as the weights are, and as
        large and slow as a model of `dtype`."""
        return pack(torch.cat([part.dequantized(dtype) for part in parts]), bias)

    def low_rank(self, in_size: int, out_size: int) -> LowRankLayer:
        return TorchLowRank(in_size, out_size)

    def quantize_weight(self, weight: Tensor, kind: str) -> QuantizedWeight:
        return quantize(weight, kind)

    def argmax(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=-1)

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
        return sample(logits, settings)

    def sample_with(self, logits: Tensor, table: Tensor) -> Tensor:
        return self.sample(logits, SamplingSettings.of_table(table.cpu().numpy()))

    def captured_sharing(self, num_requests: int, page_size: int, device: torch.device) -> None:
        return None

    def captured_adapters(
        self, room: AdapterRoom, dtype: torch.dtype, device: torch.device
    ) -> None:
        return None

    def record(
        self,
        program: Program,
        kv_caches: Sequence[tuple[Tensor, ...]],
        group_of_layer: Sequence[int] = (),
    ) -> RecordedStep:
        raise CannotRecord("torch's ops are called one by one")

    def set_num_threads(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)

    @property
    def exact_products(self) -> bool:
        return False

    def set_exact_products(self, exact: bool) -> None:
        if exact:
            raise ConfigError(
                "--cpu-products exact is a choice of the compiled kernels, but those of "
                f"{self.name} compute; leave it out"
            )


def _visible_pages(
    batch: AttentionBatch, page_size: int, window: int | None
) -> tuple[Tensor, AttentionBatch]:
    """(pages [n] that hold keys which are seen, the batch over a copy of them in this order).

    What a window leaves out of a request is not in the copy, as if the request began later: no
    trait depends on anything but the distance between tokens."""
    name = f"torch dense {window}"
    if name in batch.cache:
        return cast("tuple[Tensor, AttentionBatch]", batch.cache[name])
    table = batch.page_table
    if window is None:
        pages, dropped = table, [0] * len(batch.query_lens)
    else:
        dropped = [first // page_size for first in first_keys(batch, window)]
        counts = [
            -(-length // page_size) - first
            for length, first in zip(batch.context_lens, dropped, strict=True)
        ]
        place = torch.arange(max(counts), device=table.device).expand(len(counts), -1)
        first, count = torch.tensor([dropped, counts], device=table.device).unsqueeze(2)
        inside = place < count
        pages = table.gather(1, torch.where(inside, first + place, 0).long())
        pages = pages.masked_fill(~inside, 0)
    numbered = torch.arange(pages.numel(), dtype=torch.int32, device=table.device)
    lengths = [
        length - first * page_size
        for length, first in zip(batch.context_lens, dropped, strict=True)
    ]
    dense = replace(
        batch,
        page_table=numbered.view_as(pages),
        context_len=torch.tensor(lengths, dtype=torch.int32, device=table.device),
        context_lens=tuple(lengths),
        cache={},
    )
    found = batch.cache[name] = (pages.flatten(), dense)
    return found


def _norm_heads(
    qk: Tensor, num_heads: int, q_norm: Tensor | None, k_norm: Tensor | None, eps: float
) -> Tensor:
    """RMS norm of each q head and each k head; qk [T, Hq + Hk, D] fp32."""
    normed = F.rms_norm(qk, (qk.shape[-1],), None, eps)
    for heads, weight in ((slice(0, num_heads), q_norm), (slice(num_heads, None), k_norm)):
        if weight is None:
            normed[:, heads] = qk[:, heads]
        else:
            normed[:, heads].mul_(weight)
    return normed


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the first R entries of each head; x [T, H, D] and cos_sin [T, R], both fp32."""
    num_tokens, num_heads, head_dim = x.shape
    rotary_dim = cos_sin.shape[1]
    cos, sin = cos_sin.view(num_tokens, 1, 2, rotary_dim // 2).unbind(2)
    halves = x[..., :rotary_dim].view(num_tokens, num_heads, 2, rotary_dim // 2)
    first, second = halves.unbind(2)
    rotated: Tensor = halves * cos.unsqueeze(2)
    rotated_first, rotated_second = rotated.unbind(2)
    rotated_first.addcmul_(second, sin, value=-1)
    rotated_second.addcmul_(first, sin)
    if rotary_dim == head_dim:
        return rotated.view(num_tokens, num_heads, head_dim)
    return torch.cat((rotated.flatten(2), x[..., rotary_dim:]), dim=-1)
