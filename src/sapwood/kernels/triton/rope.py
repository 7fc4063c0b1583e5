"""QK-norm, rotary embedding and the KV write in one pass over the qkv projection's output.

Errors against the reference, of the largest entry: 1e-5 in fp32, one rounding in the others, and
two in the normed heads, which the reference rounds before it rotates them."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.kv_cache import LARGEST_NUMBER
from sapwood.kernels.triton.kv_format import KV_NAMES, parted
from sapwood.kernels.triton.small_floats import decode, encode

_HEADS_AT_ONCE = 8


@triton.jit
def _scaled(x, top, number, BLOCK_H: tl.constexpr):
    """(fp32 scales [BLOCK_H] with which `top` becomes at most `number`, x divided by them)"""
    bits = tl.div_rn(top, tl.full((BLOCK_H,), number, tl.float32)).to(tl.int32, bitcast=True)
    scale = tl.where(top < 1e-30, 0, (bits + 0xFFFF) & -65536).to(tl.float32, bitcast=True)
    one = tl.full((BLOCK_H,), 1.0, tl.float32)
    inverse = tl.where(scale > 0, tl.div_rn(one, tl.where(scale > 0, scale, one)), 0.0)
    scaled = x * inverse[:, None]
    return scale, tl.where(scaled == scaled, scaled, 0.0)  # then the scale is no number


@triton.jit
def _quantized(x, KV: tl.constexpr, LARGEST: tl.constexpr, BLOCK_H: tl.constexpr):
    """x [BLOCK_H, BLOCK_D] fp32 -> numbers uint8 and scales [BLOCK_H] bf16, as kernels/kv_cache.py
    has them, bit by bit for all numbers, but where sums in another order make another scale of
    fp8's the best one."""
    magnitude = tl.abs(x)
    top = tl.max(magnitude, axis=1)
    # The maximum of a row passes over NaN.
    has_nan = tl.sum((x != x).to(tl.int32), axis=1) > 0
    top = tl.where(has_nan, float("nan"), top)
    scale, scaled = _scaled(x, top, LARGEST, BLOCK_H)
    if KV == "int8":
        # Rounds half to even: the sum has no bits left for fractions.
        numbers = ((scaled + 12582912.0) - 12582912.0).to(tl.int32)
    else:
        mantissa: tl.constexpr = 3 if KV == "fp8_e4m3" else 2
        bias: tl.constexpr = 7 if KV == "fp8_e4m3" else 15
        first = scale
        least = tl.full((BLOCK_H,), float("inf"), tl.float32)
        for step in tl.static_range(8):
            candidate, tried = _scaled(x, top, LARGEST * 2 ** (-step / 8), BLOCK_H)
            error = decode(encode(tried, mantissa, bias), 8, mantissa, bias) - tried
            factor = tl.where(first > 0, candidate / first, 1.0)
            total = tl.sum(error * error, axis=1) * factor * factor
            is_better = total < least
            least = tl.where(is_better, total, least)
            scale = tl.where(is_better, candidate, scale)
            scaled = tl.where(is_better[:, None], tried, scaled)
        numbers = encode(scaled, mantissa, bias)
    return numbers.to(tl.uint8), scale.to(tl.bfloat16)


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
    key_scales_ptr,
    value_scales_ptr,
    qkv_stride,
    key_page_stride,
    value_page_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    KV: tl.constexpr,
    LARGEST: tl.constexpr,
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
    is_kept = head < tl.where(index >= 0, NUM_HEADS + 2 * NUM_KV_HEADS, 0)
    key_head = head - NUM_HEADS
    value_head = key_head - NUM_KV_HEADS
    writes_key, writes_value = is_k & is_kept, is_v & is_kept
    key_tile = page * key_page_stride + key_head * TILE
    value_tile = page * value_page_stride + value_head * TILE
    in_tile = (offset * HEAD_DIM + entry)[None, :]
    if KV == "":
        keys, values = out.to(key_ptr.dtype.element_ty), raw.to(value_ptr.dtype.element_ty)
    else:
        # A key is rounded to the model's dtype first, as in a cache of that dtype.
        entries = tl.where(is_k[:, None], out.to(q_type).to(tl.float32), raw.to(tl.float32))
        entries = tl.where(inside, entries, 0.0)
        keys, scales = _quantized(entries, KV, LARGEST, BLOCK_H)
        values = keys
        tl.store(key_scales_ptr + key_tile // 2 + offset, scales, mask=writes_key)
        tl.store(value_scales_ptr + value_tile // 2 + offset, scales, mask=writes_value)
    tl.store(key_ptr + key_tile[:, None] + in_tile, keys, mask=inside & writes_key[:, None])
    tl.store(value_ptr + value_tile[:, None] + in_tile, values, mask=inside & writes_value[:, None])


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
    keys, key_scales = parted(key_cache, head_dim)
    values, value_scales = parted(value_cache, head_dim)
    all_heads = num_heads + 2 * num_kv_heads
    _qk_norm_rope_write_kv[(num_tokens, triton.cdiv(all_heads, _HEADS_AT_ONCE))](
        qkv,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        cos_sin,
        positions,
        write_index,
        q,
        keys,
        values,
        key_scales,
        value_scales,
        qkv.stride(0),
        keys.stride(0),
        values.stride(0),
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=cos_sin.shape[1],
        PAGE_SIZE=keys.shape[2],
        TILE=keys.stride(1),
        KV=KV_NAMES.get(key_cache.dtype, ""),
        LARGEST=LARGEST_NUMBER.get(key_cache.dtype, 0.0),
        HAS_Q_NORM=q_norm is not None,
        HAS_K_NORM=k_norm is not None,
        BLOCK_H=_HEADS_AT_ONCE,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=4,
        # A fused multiply-add would round once instead of twice.
        enable_fp_fusion=key_scales is None,
    )
    return q
