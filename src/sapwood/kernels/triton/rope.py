"""QK-norm, rotary embedding and the KV write in one pass over the qkv projection's output.

Errors against the reference, of the largest entry: 1e-5 in fp32, one rounding in the others, and
two in the normed heads, which the reference rounds before it rotates them."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS_AT_ONCE = 8


@triton.jit
def _qk_norm_rope_write_kv(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_sin_ptr,
    position_ptr,
    write_index_ptr,
    q_ptr,
    key_ptr,
    value_ptr,
    qkv_stride,
    key_page_stride,
    value_page_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_H heads of one token. Each entry's partner in the rotation is read a second time, from
    the cache; so any head size and any rotary part need no other shape of tile."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    entry = tl.arange(0, BLOCK_D)
    is_q = head < NUM_HEADS
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    is_v = (head >= NUM_HEADS + NUM_KV_HEADS) & (head < NUM_HEADS + 2 * NUM_KV_HEADS)
    in_head = entry < HEAD_DIM
    inside = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & in_head[None, :]

    half: tl.constexpr = ROTARY_DIM // 2
    partner = tl.where(entry < half, entry + half, tl.where(entry < 2 * half, entry - half, entry))
    rows = qkv_ptr + token * qkv_stride + head[:, None] * HEAD_DIM
    raw = tl.load(rows + entry[None, :], mask=inside, other=0.0)
    x = raw.to(tl.float32)
    other = tl.load(rows + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_Q_NORM or HAS_K_NORM:
        inverse_rms = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
        if HAS_Q_NORM:
            normed = is_q[:, None]
            weight = tl.load(q_norm_ptr + entry, mask=in_head, other=0.0).to(tl.float32)
            of_other = tl.load(q_norm_ptr + partner, mask=in_head, other=0.0).to(tl.float32)
            x = tl.where(normed, x * inverse_rms * weight[None, :], x)
            other = tl.where(normed, other * inverse_rms * of_other[None, :], other)
        if HAS_K_NORM:
            normed = is_k[:, None]
            weight = tl.load(k_norm_ptr + entry, mask=in_head, other=0.0).to(tl.float32)
            of_other = tl.load(k_norm_ptr + partner, mask=in_head, other=0.0).to(tl.float32)
            x = tl.where(normed, x * inverse_rms * weight[None, :], x)
            other = tl.where(normed, other * inverse_rms * of_other[None, :], other)

    angle = tl.where(entry < half, entry, entry - half)
    rotated = entry < 2 * half
    table = cos_sin_ptr + tl.load(position_ptr + token) * ROTARY_DIM
    cos = tl.load(table + angle, mask=rotated, other=1.0)
    sin = tl.load(table + half + angle, mask=rotated, other=0.0)
    sin = tl.where(entry < half, -sin, sin)
    out = x * cos[None, :] + other * sin[None, :]

    q_rows = q_ptr + (token * NUM_HEADS + head[:, None]) * HEAD_DIM
    q_type = q_ptr.dtype.element_ty
    tl.store(q_rows + entry[None, :], out.to(q_type), mask=inside & is_q[:, None])
    index = tl.load(write_index_ptr + token)
    page = index // PAGE_SIZE
    offset = index % PAGE_SIZE
    is_kept = (entry < tl.where(index >= 0, HEAD_DIM, 0))[None, :]
    key_head = head - NUM_HEADS
    key_rows = (
        key_ptr + page * key_page_stride + (key_head[:, None] * PAGE_SIZE + offset) * HEAD_DIM
    )
    key_type = key_ptr.dtype.element_ty
    tl.store(key_rows + entry[None, :], out.to(key_type), mask=inside & is_k[:, None] & is_kept)
    value_head = key_head - NUM_KV_HEADS
    value_rows = value_ptr + page * value_page_stride
    value_rows += (value_head[:, None] * PAGE_SIZE + offset) * HEAD_DIM
    value_type = value_ptr.dtype.element_ty
    tl.store(value_rows + entry[None, :], raw.to(value_type), mask=inside & is_v[:, None] & is_kept)


def qk_norm_rope_write_kv(
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
    """As Kernels.qk_norm_rope_write_kv; a negative write index writes nothing, so that the rows
    which fill up a captured batch leave no trace."""
    num_tokens = qkv.shape[0]
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    all_heads = num_heads + 2 * num_kv_heads
    _qk_norm_rope_write_kv[(num_tokens, triton.cdiv(all_heads, _HEADS_AT_ONCE))](
        qkv,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        cos_sin,
        positions,
        write_index,
        q,
        key_cache,
        value_cache,
        qkv.stride(0),
        key_cache.stride(0),
        value_cache.stride(0),
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=cos_sin.shape[1],
        PAGE_SIZE=key_cache.shape[2],
        HAS_Q_NORM=q_norm is not None,
        HAS_K_NORM=k_norm is not None,
        BLOCK_H=_HEADS_AT_ONCE,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=4,
    )
    return q
