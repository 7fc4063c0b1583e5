"""Each op as its definition reads, in fp32 inside; slow, and meant to be compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.kernels.interface import AttentionBatch, PackedLinear
from sapwood.kernels.registry import Need


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        out = x.float() @ self.weight.float().T
        if self.bias is not None:
            out = out + self.bias.float()
        return out.to(x.dtype)


class ReferenceKernels:
    """Runs wherever torch does. Sources of the formulas: see kernels/interface.py."""

    name = "reference"

    @staticmethod
    def why_not(need: Need) -> str | None:
        if not need.dtype.is_floating_point:
            return f"{need.dtype} is not a floating point type"
        return None

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return weight[token_ids]

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
        page_size = key_cache.shape[2]
        for row, index in enumerate(write_index.tolist()):
            page, offset = divmod(index, page_size)
            key_cache[page, :, offset] = k[row]
            value_cache[page, :, offset] = v[row]
        return q

    def paged_attention(
        self, q: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch, scale: float
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
                cache[pages].transpose(0, 1).flatten(1, 2)[:, :length].float()
                .repeat_interleave(group, dim=0)
                for cache in (key_cache, value_cache)
            )  # fmt: skip
            scores = q[start:end].float().transpose(0, 1) @ keys.transpose(1, 2) * scale
            key_position = torch.arange(length, device=q.device)
            query_position = torch.arange(length - num_new, length, device=q.device)
            hidden = key_position[None, :] > query_position[:, None]
            weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
            out[start:end] = (weights @ values).transpose(0, 1).to(q.dtype)
            start = end
        return out

    def silu_and_mul(self, x: Tensor) -> Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        return (gate * torch.sigmoid(gate) * up).to(x.dtype)

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        return _Linear(weight, bias)


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the first R entries of each head; x [T, H, D], cos_sin [T, R] fp32."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    wide = x.float()
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    rotated = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat(rotated, dim=-1).to(x.dtype)
