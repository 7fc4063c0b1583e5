"""Each op written like its definition and computed in fp32: slow, for tests to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.kernels import kv_cache
from sapwood.kernels.coded import LinearPart
from sapwood.kernels.interface import PLAIN, AttentionBatch, AttentionTraits, PackedLinear
from sapwood.kernels.kv_cache import is_8_bit
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.kernels.recording import CannotRecord, Program, RecordedStep
from sapwood.kernels.reference.quantized import QuantizedLinear, quantize
from sapwood.kernels.registry import Need
from sapwood.kernels.sampling_settings import SamplingSettings


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return self.fp32(x).to(x.dtype)

    def fp32(self, x: Tensor) -> Tensor:
        out = x.float() @ self.weight.float().T
        return out if self.bias is None else out + self.bias.float()


class ReferenceKernels:
    """Runs wherever torch does. Sources of the formulas: see kernels/interface.py."""

    name = "reference"
    multiplies_quantized = True
    can_be_captured = False
    isa = ""

    @staticmethod
    def why_not(need: Need) -> str | None:
        if not need.dtype.is_floating_point:
            return f"{need.dtype} is not a floating point type"
        return need.why_not_kv()

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
            pages = batch.page_table[row, : -(-length // page_size)].long()
            # [num_pages, Hk, page_size, D] -> [Hq, length, D]
            keys, values = (
                _pages_of(cache, pages, q).transpose(0, 1).flatten(1, 2)[:, :length].float()
                .repeat_interleave(group, dim=0)
                for cache in (key_cache, value_cache)
            )  # fmt: skip
            scores = q[start:end].float().transpose(0, 1) @ keys.transpose(1, 2) * scale
            key_position = torch.arange(length, device=q.device)
            query_position = torch.arange(length - num_new, length, device=q.device)
            hidden = key_position[None, :] > query_position[:, None]
            if traits.soft_cap is not None:
                scores = traits.soft_cap * torch.tanh(scores / traits.soft_cap)
            if traits.window is not None:
                hidden |= key_position[None, :] <= query_position[:, None] - traits.window
            scores = scores.masked_fill(hidden, -torch.inf)
            if traits.sinks is not None:
                sinks = traits.sinks.float().view(-1, 1, 1).expand(-1, num_new, 1)
                scores = torch.cat([scores, sinks], dim=-1)
            weights = scores.softmax(dim=-1)[..., :length]
            out[start:end] = (weights @ values).transpose(0, 1).to(q.dtype)
            start = end
        return out

    def silu_and_mul(self, x: Tensor) -> Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        return (gate * torch.sigmoid(gate) * up).to(x.dtype)

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> PackedLinear:
        return _Linear(weight.to(dtype), bias)

    def pack_quantized_linear(
        self, parts: Sequence[LinearPart], bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear:
        return QuantizedLinear(tuple(parts), bias)

    def quantize_weight(self, weight: Tensor, kind: str) -> QuantizedWeight:
        return quantize(weight, kind)

    def argmax(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=-1)

    def mask_logits(self, logits: Tensor, masks: Tensor, rows: Sequence[int]) -> None:
        tokens = torch.arange(logits.shape[1])
        for mask, row in zip(masks, rows, strict=True):
            is_allowed = (mask[tokens // 32] >> (tokens % 32)) & 1
            logits[row, (is_allowed == 0).to(logits.device)] = -torch.inf

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

    def record(self, program: Program, kv_caches: Sequence[tuple[Tensor, Tensor]]) -> RecordedStep:
        raise CannotRecord("the reference's ops are called one by one")

    def set_num_threads(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)


def _pages_of(cache: Tensor, pages: Tensor, q: Tensor) -> Tensor:
    """[len(pages), Hk, page_size, D]"""
    if is_8_bit(cache.dtype):
        return kv_cache.dequantize_pages(cache, pages, q.shape[-1], torch.float32)
    return cache[pages]


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
