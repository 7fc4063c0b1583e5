"""Paged attention on a GPU: which kernels run for a batch, and on what grid.

A batch's decodes go to the decode kernel and its other requests to the extend kernel. Where several
requests share pages and it pays, these pages are attended to once for all of them. Grids follow
from the shapes of the tensors alone, and lengths are read on the device: no call waits for the
device, and a decode can be captured in a graph. `query_lens` chooses the rows of an extend's tiles;
whatever they are, results are right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood.kernels.attention_batch import PLAIN, AttentionBatch, AttentionTraits
from sapwood.kernels.kv_cache import kv_cache_shape
from sapwood.kernels.triton.attention_decode import decode_kernel
from sapwood.kernels.triton.attention_extend import extend_kernel
from sapwood.kernels.triton.attention_fixed import fixed_kernel, fixed_merge_kernel
from sapwood.kernels.triton.attention_merge import merge_kernel
from sapwood.kernels.triton.attention_shared import shared_kernel
from sapwood.kernels.triton.attention_shared_tiles import SharedTiles, extends_share, shared_tiles
from sapwood.kernels.triton.attention_sizes import (
    DECODE,
    EXTEND,
    MAX_GROUP,
    MAX_HEAD_DIM,
    SHARED,
    SplitRule,
    TileSizes,
    fixed_sizes,
    next_power_of_2,
    tile_sizes,
)
from sapwood.kernels.triton.kv_format import KV_NAMES, parted

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """Memory for the parts of a softmax that several programs compute; see attention_core.store.

    values  [T, Hq, num_parts, D] fp32
    lse     [T, Hq, num_parts] fp32
    """

    values: Tensor
    lse: Tensor

    @property
    def num_parts(self) -> int:
        return self.lse.shape[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """The arguments that all launches for one layer's attention have in common.

    key_cache   [num_pages, Hk, page_size, D]; for an 8-bit cache its numbers, uint8
    key_scales  [num_pages, Hk, page_size] bf16 for an 8-bit cache, else None
    kv          kind of the cache, as in attention_core.attend
    """

    q: Tensor
    key_cache: Tensor
    value_cache: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    kv: str
    batch: AttentionBatch
    scale: float
    traits: AttentionTraits
    out: Tensor

    @property
    def num_kv_heads(self) -> int:
        return self.key_cache.shape[1]

    @property
    def page_size(self) -> int:
        return self.key_cache.shape[2]

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.num_kv_heads

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.q, self.key_cache, self.value_cache, self.key_scales, self.value_scales

    def sizes(self, max_tokens: int) -> TileSizes:
        """The tile sizes for tiles of at most `max_tokens` tokens."""
        return tile_sizes(max_tokens, self.group, self.q.shape[2], self.q.dtype)

    def num_splits(self, rule: SplitRule, num_tiles: int) -> int:
        max_keys = self.batch.page_table.shape[1] * self.page_size
        if self.traits.window is not None:
            max_keys = min(max_keys, self.traits.window + self.page_size)
        return rule.num_splits(num_tiles * self.num_kv_heads, max_keys)

    def strides(self) -> tuple[int, ...]:
        return (
            *self.q.stride()[:2],
            self.batch.page_table.stride(0),
            *self.key_cache.stride()[:3],
            *self.value_cache.stride()[:3],
            self.q.shape[1],
        )

    def constants(self, sizes: TileSizes, rule: SplitRule) -> dict[str, Any]:
        return {
            "GROUP": self.group,
            "HEAD_DIM": self.q.shape[2],
            "PAGE_SIZE": self.page_size,
            "KV": self.kv,
            "SOFT_CAP": self.traits.soft_cap or 0.0,
            "WINDOW": self.traits.window or 0,
            "BLOCK_M": sizes.block_m,
            "BLOCK_N": sizes.block_n,
            "BLOCK_D": sizes.block_d,
            "MIN_CHUNK": rule.min_chunk,
            "num_warps": sizes.num_warps,
            "num_stages": sizes.num_stages,
        }


class PagedAttention:
    """See `Kernels.paged_attention`: all traits, head sizes up to 256, any page size, float16,
    bfloat16 and float32, keys and values of q's dtype or in 8 bits, which are dequantised to it
    as they are read.

    Deviation from fp32 arithmetic as ||difference|| / ||result|| of a token, largest of the tests'
    random inputs: float32 5e-7, float16 6e-4 (weights are rounded before they multiply values),
    bfloat16 7e-3 in Triton's interpreter, which rounds towards zero; a GPU rounds to the nearest,
    and 8 times float16's error is to be expected."""

    def __call__(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        traits: AttentionTraits = PLAIN,
        fixed_chunk: int | None = None,
    ) -> Tensor:
        """fixed_chunk: keys of a chunk, a multiple of 128, where the results of a token must not
        depend on the batch; None: keys are split by what the batch needs"""
        _check(q, key_cache, value_cache, traits)
        q = q if q.stride(2) == 1 else q.contiguous()
        keys, key_scales = parted(key_cache, q.shape[2])
        values, value_scales = parted(value_cache, q.shape[2])
        call = _Call(
            q=q,
            key_cache=keys,
            value_cache=values,
            key_scales=key_scales,
            value_scales=value_scales,
            kv=KV_NAMES.get(key_cache.dtype, ""),
            batch=batch,
            scale=scale,
            traits=traits,
            out=torch.empty(q.shape, dtype=q.dtype, device=q.device),
        )
        if fixed_chunk is not None:
            _attend_fixed(call, fixed_chunk)
            return call.out
        tiles = shared_tiles(batch, call.page_size, call.sizes(MAX_GROUP).tokens(call.group))
        with_extends = tiles is not None and extends_share(batch)
        if tiles is None:
            _decode_apart(call)
        else:
            _attend_shared(call, tiles, with_extends=with_extends)
        if not with_extends:
            _extend_apart(call)
        return call.out


def _check(q: Tensor, key_cache: Tensor, value_cache: Tensor, traits: AttentionTraits) -> None:
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, page_size = key_cache.shape[1:3]
    if q.dtype not in DTYPES or key_cache.dtype not in (q.dtype, *KV_NAMES):
        raise TypeError(
            f"q is {q.dtype} and key_cache {key_cache.dtype}; q must be float16, bfloat16 or "
            "float32, and the cache of the same dtype or in 8 bits"
        )
    width = kv_cache_shape(1, num_kv_heads, page_size, head_dim, key_cache.dtype)[3]
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.dtype != key_cache.dtype or tuple(cache.shape[1:]) != (
            num_kv_heads, page_size, width
        ):  # fmt: skip
            raise ValueError(
                f"{name} {list(cache.shape)} {cache.dtype} must be [pages, {num_kv_heads}, "
                f"{page_size}, {width}] {key_cache.dtype} for q's head size {head_dim}"
            )
        if cache.stride(3) != 1:
            raise ValueError(f"the entries of a head must lie together in {name}")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head size {head_dim} is more than {MAX_HEAD_DIM}")
    if num_heads % num_kv_heads or num_heads // num_kv_heads > MAX_GROUP:
        raise ValueError(
            f"{num_heads} query heads must be a multiple of {num_kv_heads} key and value heads, "
            f"and at most {MAX_GROUP} times as many"
        )
    for name, numbers in (("sinks", traits.sinks), ("alibi", traits.alibi)):
        if numbers is not None and (
            numbers.shape != (num_heads,)
            or numbers.dtype != torch.float32
            or not numbers.is_contiguous()
        ):
            raise ValueError(
                f"{name} {list(numbers.shape)} {numbers.dtype} must be [{num_heads}] float32, "
                "contiguous"
            )


def _decode_apart(call: _Call) -> None:
    """Every decode reads its own pages."""
    num_decodes = call.batch.num_decodes
    if num_decodes == 0:
        return
    num_splits = call.num_splits(DECODE, num_decodes)
    parts = _parts_of(call, num_decodes, num_splits) if num_splits > 1 else None
    _decode(call, num_splits, parts)
    if parts is not None:
        _merge(call, parts, 0)


def _extend_apart(call: _Call) -> None:
    """Every request that is no decode reads its own pages."""
    num_decodes = call.batch.num_decodes
    if num_decodes == len(call.batch.query_lens):
        return
    num_tiles, sizes = _extend_tiles(call)
    num_splits = call.num_splits(EXTEND, num_tiles)
    # Rows are counted from the batch's first, so that the parts of decodes stay unused.
    parts = _parts_of(call, call.q.shape[0], num_splits) if num_splits > 1 else None
    _extend(call, num_tiles, sizes, num_splits, parts)
    if parts is not None:
        _merge(call, parts, num_decodes)


def _attend_fixed(call: _Call, chunk: int) -> None:
    """Every request reads its own pages, in chunks that the batch has no part in."""
    num_decodes, num_requests = call.batch.num_decodes, len(call.batch.query_lens)
    if num_decodes:
        max_keys = call.batch.page_table.shape[1] * call.page_size
        _fixed(call, chunk, 0, num_decodes, _parts_of(call, num_decodes, -(-max_keys // chunk)))
    if num_decodes < num_requests:
        _fixed(call, chunk, num_decodes, num_requests, None)


def _fixed(call: _Call, chunk: int, first: int, end: int, parts: _Parts | None) -> None:
    """The requests first .. end; with parts, these are decodes."""
    batch, group = call.batch, call.group
    sizes = fixed_sizes(group, call.q.shape[2], call.q.dtype)
    num_requests = end - first
    num_tokens = num_requests if parts is not None else call.q.shape[0] - first
    num_tiles = num_tokens // sizes.tokens(group) + num_requests
    values, lse, num_parts = _fields(parts)
    constants = call.constants(sizes, EXTEND) | {"CHUNK": chunk, "enable_fp_fusion": False}
    del constants["MIN_CHUNK"]
    fixed_kernel[(max(1, num_parts), call.num_kv_heads, num_tiles)](
        *call.operands, batch.page_table[first:], batch.context_len[first:],
        batch.query_start[first:], call.out, values, lse, call.traits.sinks, call.traits.alibi,
        batch.sees, call.scale, *call.strides(), num_requests, num_tiles, num_parts,
        **constants,
    )  # fmt: skip
    if parts is not None:
        num_heads, head_dim = call.q.shape[1:]
        fixed_merge_kernel[(num_requests, num_heads)](
            values, lse, call.traits.sinks, call.out, num_heads, num_parts,
            HEAD_DIM=head_dim, BLOCK_D=sizes.block_d, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _attend_shared(call: _Call, tiles: SharedTiles, *, with_extends: bool) -> None:
    """Attend to shared pages once for all requests, then to the further pages of each request.

    with_extends  whether requests that are no decodes are attended to as well
    """
    batch = call.batch
    num_shared = call.num_splits(SHARED, tiles.tokens.shape[0])
    num_decode_splits = call.num_splits(DECODE, batch.num_decodes) if batch.num_decodes else 0
    num_tiles, sizes, num_extend_splits = 0, None, 0
    if with_extends and batch.num_decodes < len(batch.query_lens):
        num_tiles, sizes = _extend_tiles(call)
        num_extend_splits = call.num_splits(EXTEND, num_tiles)
    num_rows = call.q.shape[0] if with_extends else batch.num_decodes
    parts = _parts_of(call, num_rows, num_shared + max(num_decode_splits, num_extend_splits))
    # Not every row has all parts: those that are not written count as parts without keys.
    parts.lse.fill_(-torch.inf)
    shared_kernel[(num_shared, call.num_kv_heads, tiles.tokens.shape[0])](
        *call.operands, batch.page_table, batch.context_len,
        batch.query_start, tiles.tokens, tiles.requests, tiles.shared_len,
        parts.values, parts.lse, call.traits.alibi, call.scale,
        *call.strides(), num_shared, parts.num_parts,
        **call.constants(call.sizes(MAX_GROUP), SHARED),
    )  # fmt: skip
    if num_decode_splits:
        _decode(call, num_decode_splits, parts, tiles.shared_len, num_shared)
    if sizes is not None:
        _extend(call, num_tiles, sizes, num_extend_splits, parts, tiles.shared_len, num_shared)
    _merge(call, parts, 0)


def _decode(
    call: _Call,
    num_splits: int,
    parts: _Parts | None,
    shared_len: Tensor | None = None,
    first_part: int = 0,
) -> None:
    batch = call.batch
    values, lse, num_parts = _fields(parts)
    decode_kernel[(num_splits, call.num_kv_heads, batch.num_decodes)](
        *call.operands, batch.page_table, batch.context_len, shared_len,
        call.out, values, lse, call.traits.sinks, call.traits.alibi, call.scale,
        *call.strides(), num_splits, num_parts, first_part,
        **call.constants(call.sizes(1), DECODE),
    )  # fmt: skip


def _extend_tiles(call: _Call) -> tuple[int, TileSizes]:
    """A number of tiles that is enough for all requests that are no decodes, and their sizes."""
    batch = call.batch
    sizes = call.sizes(max(batch.query_lens[batch.num_decodes :]))
    num_tokens = call.q.shape[0] - batch.num_decodes
    num_requests = len(batch.query_lens) - batch.num_decodes
    return num_tokens // sizes.tokens(call.group) + num_requests, sizes


def _extend(
    call: _Call,
    num_tiles: int,
    sizes: TileSizes,
    num_splits: int,
    parts: _Parts | None,
    shared_len: Tensor | None = None,
    first_part: int = 0,
) -> None:
    batch = call.batch
    first = batch.num_decodes
    values, lse, num_parts = _fields(parts)
    extend_kernel[(num_splits, call.num_kv_heads, num_tiles)](
        *call.operands, batch.page_table[first:],
        batch.context_len[first:], batch.query_start[first:],
        None if shared_len is None else shared_len[first:],
        call.out, values, lse, call.traits.sinks, call.traits.alibi, batch.sees, call.scale,
        *call.strides(), len(batch.query_lens) - first, num_tiles, num_splits, num_parts,
        first_part,
        **call.constants(sizes, EXTEND),
    )  # fmt: skip


def _merge(call: _Call, parts: _Parts, first_row: int) -> None:
    num_heads, head_dim = call.q.shape[1:]
    values, lse = parts.values[first_row:], parts.lse[first_row:]
    merge_kernel[(values.shape[0], num_heads)](
        values, lse, call.traits.sinks, call.out[first_row:], num_heads, parts.num_parts,
        HEAD_DIM=head_dim, BLOCK_D=max(16, next_power_of_2(head_dim)), BLOCK_P=16, num_warps=4,
    )  # fmt: skip


def _parts_of(call: _Call, num_rows: int, num_parts: int) -> _Parts:
    _, num_heads, head_dim = call.q.shape
    return _Parts(
        values=call.out.new_empty((num_rows, num_heads, num_parts, head_dim), dtype=torch.float32),
        lse=call.out.new_empty((num_rows, num_heads, num_parts), dtype=torch.float32),
    )


def _fields(parts: _Parts | None) -> tuple[Tensor | None, Tensor | None, int]:
    return (None, None, 0) if parts is None else (parts.values, parts.lse, parts.num_parts)
