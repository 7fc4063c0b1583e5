"""Each op written like its definition and computed in fp32: slow, for tests to compare with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
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
from sapwood.kernels.reference.experts import Experts, route
from sapwood.kernels.reference.low_rank import ReferenceLowRank
from sapwood.kernels.reference.quantized import QuantizedLinear, quantize
from sapwood.kernels.reference.state_space import selective_scan
from sapwood.kernels.reference.states import gated_delta_rule, gated_rms_norm
from sapwood.kernels.registry import Need
from sapwood.kernels.routing import Routing
from sapwood.kernels.sampling_settings import SamplingSettings
from sapwood.kernels.state_forms import DeltaForm, GatedNormForm
from sapwood.kernels.state_space import StateSpace
from sapwood.kernels.texts import EqualTexts
from sapwood.kernels.torch_ops.experts import activation_of
from sapwood.kernels.tree_masks import unseen

_ATTENTION = frozenset({SLIDING_WINDOW, SOFT_CAP, SINKS, ALIBI, LATENT, CHOSEN_KEYS})


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return self.fp32(x).to(x.dtype)

    def fp32(self, x: Tensor) -> Tensor:
        out = x.float() @ self.weight.float().T
        return out if self.bias is None else out + self.bias.float()

    def unpacked(self) -> Tensor:
        return self.weight

    def refill(self, weight: Tensor) -> bool:
        self.weight.copy_(weight)
        return True


@dataclass(frozen=True, slots=True)
class _HeadProducts:
    weight: Tensor

    def __call__(self, x: Tensor, out: Tensor) -> None:
        _, num_out, num_in = self.weight.shape
        for head, weight in enumerate(self.weight.float()):
            out[:, head, :num_out] = (x[:, head, :num_in].float() @ weight.T).to(out.dtype)
        out[..., num_out:] = x[..., num_in:]


class ReferenceKernels:
    """Runs wherever torch does. Sources of the formulas: see kernels/interface.py."""

    name = "reference"
    multiplies_quantized = True
    can_be_captured = False
    captures_experts = False
    isa = ""

    @staticmethod
    def why_not(need: Need) -> str | None:
        if not need.dtype.is_floating_point:
            return f"{need.dtype} is not a floating point type"
        return need.why_not_kv() or lacking(need.attention, _ATTENTION)

    def embedding(
        self, token_ids: Tensor, weight: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        return weight[token_ids].to(dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        mean_square = wide.square().mean(dim=-1, keepdim=True)
        return (wide * torch.rsqrt(mean_square + eps) * weight.float()).to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = x + residual
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
        heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
        q, k = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]
        v = heads[:, num_heads + num_kv_heads :]
        if q_norm is not None:
            q = self.rms_norm(q, q_norm, eps)
        if k_norm is not None:
            k = self.rms_norm(k, k_norm, eps)
        q, k = _rotate(q, cos_sin[positions]), _rotate(k, cos_sin[positions])
        if is_8_bit(key_cache.dtype):
            kv_cache.write(key_cache, write_index, k)
            kv_cache.write(value_cache, write_index, v)
            return q
        page_size = key_cache.shape[2]
        for row, index in enumerate(write_index.tolist()):
            page, offset = divmod(index, page_size)
            key_cache[page, :, offset] = k[row]
            value_cache[page, :, offset] = v[row]
        return q

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        traits: AttentionTraits = PLAIN,
    ) -> Tensor:
        out = torch.empty_like(q)
        page_size = key_cache.shape[2]
        group = q.shape[1] // key_cache.shape[1]
        start = 0
        for row, (num_new, length) in enumerate(
            zip(batch.query_lens, batch.context_lens, strict=True)
        ):
            end = start + num_new
            query_position = torch.arange(length - num_new, length, device=q.device)
            # Pages before the window of the first query may be another request's.
            window = length if traits.window is None else traits.window
            first_page = max(0, length - num_new - window + 1) // page_size
            pages = batch.page_table[row, first_page : -(-length // page_size)].long()
            key_position = torch.arange(first_page * page_size, length, device=q.device)
            # [num_pages, Hk, page_size, D] -> [Hq, keys, D]
            keys, values = (
                _pages_of(cache, pages, q).transpose(0, 1).flatten(1, 2)[:, : len(key_position)]
                .float().repeat_interleave(group, dim=0)
                for cache in (key_cache, value_cache)
            )  # fmt: skip
            scores = q[start:end].float().transpose(0, 1) @ keys.transpose(1, 2) * scale
            hidden = key_position[None, :] > query_position[:, None]
            if batch.sees is not None:
                hidden[:, -num_new:] |= unseen(batch.sees[start:end])
            if traits.soft_cap is not None:
                scores = traits.soft_cap * torch.tanh(scores / traits.soft_cap)
            if traits.alibi is not None:
                distance = key_position[None, :] - query_position[:, None]
                scores = scores + traits.alibi.view(-1, 1, 1) * distance
            if traits.window is not None:
                hidden |= key_position[None, :] <= query_position[:, None] - traits.window
            scores = scores.masked_fill(hidden, -torch.inf)
            if traits.sinks is not None:
                sinks = traits.sinks.float().view(-1, 1, 1).expand(-1, num_new, 1)
                scores = torch.cat([scores, sinks], dim=-1)
            weights = scores.softmax(dim=-1)[..., : len(key_position)]
            out[start:end] = (weights @ values).transpose(0, 1).to(q.dtype)
            start = end
        return out

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
        rank = norm.shape[0]
        nope_dim = q.shape[-1] - (latent.shape[1] - rank)
        q[..., nope_dim:] = _rotate(q[..., nope_dim:], cos_sin[positions])
        key = _rotate(latent[:, None, rank:], cos_sin[positions])[:, 0]
        rows = torch.cat((self.rms_norm(latent[:, :rank], norm, eps), key), dim=-1)
        if is_8_bit(cache.dtype):
            kv_cache.write(cache, write_index, rows[:, None])
            return
        for row, index in zip(rows, write_index.tolist(), strict=True):
            page, offset = divmod(index, cache.shape[2])
            cache[page, 0, offset] = row

    def latent_attention(
        self, q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, rank: int
    ) -> Tensor:
        return self.paged_attention(q, cache, cache, batch, scale)[..., :rank]

    def choose_keys(
        self, q: Tensor, weights: Tensor, cache: Tensor, batch: AttentionBatch, num_chosen: int
    ) -> Tensor:
        found = torch.full((q.shape[0], num_chosen), -1, dtype=torch.int64, device=q.device)
        for row, request, position in _tokens(batch):
            pages = batch.page_table[request].long()
            keys = _pages_of(cache, pages, q)[:, 0].flatten(0, 1)[: position + 1].float()
            score = (weights[row, :, None] * (q[row].float() @ keys.T).relu()).sum(dim=0)
            best = score.topk(min(num_chosen, position + 1)).indices.sort().values
            found[row, : len(best)] = best
        return found

    def sparse_latent_attention(
        self,
        q: Tensor,
        cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        rank: int,
        chosen: Tensor,
    ) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[1], rank)
        for row, request, _ in _tokens(batch):
            pages = batch.page_table[request].long()
            all_keys = _pages_of(cache, pages, q)[:, 0].flatten(0, 1)
            keys = all_keys[chosen[row][chosen[row] >= 0]].float()
            weights = (q[row].float() @ keys.T * scale).softmax(dim=-1)
            out[row] = (weights @ keys[:, :rank]).to(q.dtype)
        return out

    def pack_heads(self, weight: Tensor) -> PackedHeads:
        return _HeadProducts(weight)

    def bidirectional_attention(
        self, q: Tensor, k: Tensor, v: Tensor, texts: Sequence[EqualTexts], scale: float
    ) -> Tensor:
        out = torch.empty_like(q)
        for group in texts:
            rows = torch.arange(len(q), device=q.device) if group.rows is None else group.rows
            for own in rows.view(-1, group.length):
                scores = torch.einsum("qhd,khd->hqk", q[own].float(), k[own].float()) * scale
                mixed = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v[own].float())
                out[own] = mixed.to(q.dtype)
        return out

    def norm_rotate_heads(
        self, x: Tensor, norm: Tensor | None, eps: float, rotations: Tensor | None, out: Tensor
    ) -> None:
        heads = x.reshape(out.shape)
        if norm is not None:
            flat = heads.reshape(-1, heads.shape[-1])
            heads = self.rms_norm(flat, norm, eps).view(out.shape)
        if rotations is not None:
            cosine, sine = rotations.real[:, None], rotations.imag[:, None]
            first, second = heads[..., ::2].float(), heads[..., 1::2].float()
            turned = (first * cosine - second * sine, first * sine + second * cosine)
            heads = torch.stack(turned, dim=-1).flatten(-2)
        out.copy_(heads)

    def layer_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        wide = x.float()
        away = wide - wide.mean(dim=-1, keepdim=True)
        out = away * torch.rsqrt(away.square().mean(dim=-1, keepdim=True) + eps)
        out = out if weight is None else out * weight.float()
        return (out if bias is None else out + bias.float()).to(x.dtype)

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        return _activated(x.float(), activation).to(x.dtype)

    def add_to(self, x: Tensor, total: Tensor) -> None:
        total.copy_((total.float() + x.float()).to(total.dtype))

    def xielu(self, x: Tensor, above: float, below: float) -> Tensor:
        wide = x.double()
        curve = torch.where(wide > 0, above * wide**2, below * (torch.expm1(wide) - wide))
        return (curve + wide / 2).to(x.dtype)

    def activate_and_mul(self, x: Tensor, activation: Activation) -> Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        return (_activated(gate, activation) * up).to(x.dtype)

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
        out = torch.empty_like(x)
        num_past = weight.shape[-1] - 1
        weights = weight.expand(x.shape[0], -1, -1).float()
        start = 0
        for request, (num_new, length) in enumerate(
            zip(batch.query_lens, batch.context_lens, strict=True)
        ):
            slot = int(slots[request])
            past = torch.zeros_like(states[slot]) if num_new == length else states[slot]
            inputs = torch.cat((past, x[start : start + num_new].T), dim=1)  # [C, past and new]
            for token in range(num_new):
                window = inputs[:, token : token + num_past + 1]
                total = (window.float() * weights[start + token]).sum(dim=1)
                total = total if bias is None else total + bias.float()
                total = total * torch.sigmoid(total) if silu else total
                out[start + token] = total.to(x.dtype)
            states[slot] = inputs[:, num_new:]
            start += num_new
        return out

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

    def carry_rows(
        self, source: Tensor, target: Tensor, from_rows: Sequence[int], to_rows: Sequence[int]
    ) -> None:
        for read, written in zip(from_rows, to_rows, strict=True):
            target[written].copy_(source[read])

    def copy_rows(self, tensor: Tensor, source: Tensor, target: Tensor) -> None:
        read = [tensor[row].clone() for row in source.tolist()]
        for row, content in zip(target.tolist(), read, strict=True):
            tensor[row] = content

    def gate_rows(self, x: Tensor, gate: Tensor) -> None:
        for row, logit in zip(x, gate.float()[:, 0].tolist(), strict=True):
            row.copy_(row.float() / (1.0 + math.exp(-logit)))

    def gate_columns(self, x: Tensor, gate: Tensor) -> None:
        for row, logits in zip(x, gate.float(), strict=True):
            row.copy_(row.float() / (1.0 + torch.exp(-logits)))

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
        return _Linear(weight.to(dtype), bias)

    def pack_quantized_linear(
        self, parts: Sequence[LinearPart], bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear:
        return QuantizedLinear(tuple(parts), bias)

    def low_rank(self, in_size: int, out_size: int) -> LowRankLayer:
        return ReferenceLowRank(in_size, out_size)

    def quantize_weight(self, weight: Tensor, kind: str) -> QuantizedWeight:
        return quantize(weight, kind)

    def argmax(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=-1)

    def mask_logits(self, logits: Tensor, masks: Tensor, rows: Sequence[int]) -> None:
        tokens = torch.arange(logits.shape[1])
        for mask, row in zip(masks, rows, strict=True):
            is_allowed = (mask[tokens // 32] >> (tokens % 32)) & 1
            logits[row, (is_allowed == 0).to(logits.device)] = -torch.inf

    def soft_cap(self, logits: Tensor, cap: float) -> None:
        logits.copy_(cap * torch.tanh(logits / cap))

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
        seen = logits[ids].float()
        seen = torch.where(seen > 0, seen / repetition, seen * repetition)
        seen = seen - frequency * counts - presence * (counts > 0)
        logits[ids] = seen.to(logits.dtype)

    def sample(self, logits: Tensor, settings: SamplingSettings) -> Tensor:
        chosen = [
            _draw(row.double() / settings.temperature[i], settings, i)
            for i, row in enumerate(logits)
        ]
        return torch.tensor(chosen, dtype=torch.int64, device=logits.device)

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
        raise CannotRecord("the reference's ops are called one by one")

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


def _tokens(batch: AttentionBatch) -> Iterator[tuple[int, int, int]]:
    """(row, request, position) of each new token."""
    row = 0
    for request, (num_new, length) in enumerate(
        zip(batch.query_lens, batch.context_lens, strict=True)
    ):
        for position in range(length - num_new, length):
            yield row, request, position
            row += 1


def _pages_of(cache: Tensor, pages: Tensor, q: Tensor) -> Tensor:
    """[len(pages), Hk, page_size, D]"""
    if is_8_bit(cache.dtype):
        return kv_cache.dequantize_pages(cache, pages, q.shape[-1], torch.float32)
    return cache[pages]


def _activated(x: Tensor, activation: Activation) -> Tensor:
    match activation:
        case Activation.SILU:
            return x * torch.sigmoid(x)
        case Activation.GELU:
            return x * 0.5 * torch.erfc(-x / math.sqrt(2))
        case Activation.GELU_TANH:
            cubic = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
            return x * torch.sigmoid(2 * cubic)  # 0.5 * (1 + tanh(y)) is sigmoid(2 y)
        case Activation.RELU:
            return x.clamp(min=0)
        case Activation.RELU2:
            return x.clamp(min=0).square()
        case Activation.QUICK_GELU:
            return x * torch.sigmoid(1.702 * x)


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the first R entries of each head; x [T, H, D], cos_sin [T, R] fp32."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    wide = x.float()
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    rotated = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat(rotated, dim=-1).to(x.dtype)


def _draw(logits: Tensor, settings: SamplingSettings, index: int) -> int:
    """One token of logits [vocab], which are divided by the temperature already."""
    probs, ids = torch.softmax(logits, dim=-1).sort(descending=True, stable=True)
    if settings.top_k[index] != -1:
        probs = probs[: settings.top_k[index]]
    before = probs.cumsum(-1) - probs
    probs = probs[(before < settings.top_p[index] * probs.sum()) | (settings.top_p[index] >= 1.0)]
    probs = probs[probs >= settings.min_p[index] * probs[0]]
    sums = probs.cumsum(-1)
    return int(
        ids[int((sums <= settings.numbers[index] * sums[-1]).sum().clamp(max=len(sums) - 1))]
    )
