"""A mixture's experts: two products over all pairs of a token and one of its experts, grouped by
expert, without a look at the choice on the host.

Pairs are sorted by expert, and each expert's are filled up to whole blocks of rows, so that a
program multiplies rows of one expert. How many blocks there can be follows from shapes alone: a
captured step stays right whatever tokens choose. Programs of blocks that nobody needs end at once.

Experts' weights stay where they are: a table has the distance of each from the first one's.
Weights of 4 and 8 bits are decoded as in grouped_matmul.py, and x is not rounded."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.packed import PackedExperts, PackedLinear
from sapwood.kernels.torch_ops import experts as torch_experts
from sapwood.kernels.triton.grouped_matmul import GroupedWeight, _multiply, _weight
from sapwood.kernels.triton.linear import DenseLinear, QuantizedLinear
from sapwood.kernels.triton.tiles import TileChoice, tile

_ALIGNED = 16
"""Entries that distances between experts' tensors are a multiple of: wide loads rely on it."""
_DENSE_INPUTS = 64
_FIELDS = ("scales", "shifts", "minima", "out_scales")
"""The tensors of a GroupedWeight beside its numbers, in the order of the table's columns."""


@triton.jit
def _distance(distances_ptr, expert, COLUMN: tl.constexpr):
    return tl.multiple_of(tl.load(distances_ptr + expert * 6 + COLUMN), 16)


@triton.jit
def _put(
    total, pair, n, in_rows, in_outputs, bias_ptr, distances_ptr, expert, shares_ptr, out_ptr,
    num_out,
):  # fmt: skip
    """out[pair, n] = (total + bias) * the pair's share."""
    if bias_ptr is not None:
        bias = bias_ptr + _distance(distances_ptr, expert, 5)
        total += tl.load(bias + n, mask=in_outputs, other=0.0).to(tl.float32)[None, :]
    if shares_ptr is not None:
        total *= tl.load(shares_ptr + pair, mask=in_rows, other=0.0)[:, None]
    out_ptrs = out_ptr + pair.to(tl.int64)[:, None] * num_out + n[None, :]
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=in_rows[:, None] & in_outputs[None, :])


@triton.jit(do_not_specialize=["num_pairs"])
def _dense_experts(
    x_ptr,
    weight_ptr,
    bias_ptr,
    distances_ptr,
    pairs_ptr,
    experts_ptr,
    shares_ptr,
    out_ptr,
    num_pairs,
    num_out,
    num_in,
    x_stride,
    num_experts,
    PAIRS_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert = tl.load(experts_ptr + tl.program_id(1)).to(tl.int64)
    if expert >= num_experts:
        return
    pair = tl.load(pairs_ptr + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_outputs = pair < num_pairs, n < num_out
    column = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (pair // PAIRS_PER_ROW).to(tl.int64)[:, None] * x_stride + column[None, :]
    weight_ptr += _distance(distances_ptr, expert, 0)
    weight_ptrs = weight_ptr + n.to(tl.int64)[None, :] * num_in + column[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, num_in, BLOCK_K):
        in_inputs = first + column < num_in
        x = tl.load(x_ptrs + first, mask=in_rows[:, None] & in_inputs[None, :], other=0.0)
        mask = in_inputs[:, None] & in_outputs[None, :]
        total = _multiply(x, tl.load(weight_ptrs + first, mask=mask, other=0.0), total)
    _put(
        total, pair, n, in_rows, in_outputs, bias_ptr, distances_ptr, expert, shares_ptr, out_ptr,
        num_out,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_pairs"])
def _coded_experts(
    x_ptr,
    numbers_ptr,
    scales_ptr,
    shifts_ptr,
    minima_ptr,
    out_scales_ptr,
    table_ptr,
    bias_ptr,
    distances_ptr,
    pairs_ptr,
    experts_ptr,
    shares_ptr,
    out_ptr,
    num_pairs,
    num_out,
    num_in,
    num_blocks,
    block_stride,
    output_stride,
    x_stride,
    num_experts,
    PAIRS_PER_ROW: tl.constexpr,
    VALUES: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
):
    expert = tl.load(experts_ptr + tl.program_id(1)).to(tl.int64)
    if expert >= num_experts:
        return
    pair = tl.load(pairs_ptr + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_outputs = pair < num_pairs, n < num_out
    width: tl.constexpr = BLOCK_K * BITS // 8
    column = tl.arange(0, width)
    x_ptrs = x_ptr + (pair // PAIRS_PER_ROW).to(tl.int64)[:, None] * x_stride + column[None, :]
    numbers_ptr += _distance(distances_ptr, expert, 0)
    number_ptrs = numbers_ptr + n.to(tl.int64)[None, :] * output_stride + column[:, None]
    if scales_ptr is not None:
        scales_ptr += _distance(distances_ptr, expert, 1)
    if shifts_ptr is not None:
        shifts_ptr += _distance(distances_ptr, expert, 2)
    if minima_ptr is not None:
        minima_ptr += _distance(distances_ptr, expert, 3)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in tl.range(0, num_blocks, loop_unroll_factor=UNROLL):
        number = tl.load(number_ptrs, mask=in_outputs[None, :], other=0)
        number_ptrs += block_stride
        for part in tl.static_range(8 // BITS):
            first = block * BLOCK_K + part * width
            code = number
            if BITS == 4:
                code = (number >> (4 * part)) & 15
            weight = _weight(
                code, table_ptr, scales_ptr, shifts_ptr, minima_ptr,
                first, column, n, in_outputs, num_out, num_in, VALUES, ZERO, GROUP, width,
            )  # fmt: skip
            mask = in_rows[:, None] & (first + column < num_in)[None, :]
            x = tl.load(x_ptrs + first, mask=mask, other=0.0)
            total = _multiply(x, weight.to(dtype), total)
    if out_scales_ptr is not None:
        out_scales_ptr += _distance(distances_ptr, expert, 4)
        total *= tl.load(out_scales_ptr + n, mask=in_outputs, other=0.0)[None, :]
    _put(
        total, pair, n, in_rows, in_outputs, bias_ptr, distances_ptr, expert, shares_ptr, out_ptr,
        num_out,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class SortedPairs:
    """Pairs by expert, in blocks of `block_rows`.

    pairs    [blocks * block_rows] int32: pair t * k + i is token t and its i-th expert; the number
             of all pairs stands for nobody
    experts  [blocks] int32: whose rows a block has; the number of all experts stands for nobody
    """

    pairs: Tensor
    experts: Tensor
    num_pairs: int
    block_rows: int

    @classmethod
    def of(cls, chosen: Tensor, num_experts: int, block_rows: int) -> SortedPairs:
        """chosen [T, k] int64, on the device as all that follows from it."""
        flat = chosen.flatten()
        num_pairs, device = flat.numel(), flat.device
        by_expert = flat.argsort(stable=True)
        counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
        counts.scatter_add_(0, flat, torch.ones_like(flat))
        filled = (counts + (block_rows - 1)) // block_rows * block_rows
        ends = filled.cumsum(0)
        # From the place among all sorted pairs to that among the blocks.
        moved = (ends - filled) - (counts.cumsum(0) - counts)
        places = torch.arange(num_pairs, device=device) + moved[flat[by_expert]]
        num_blocks = num_pairs // block_rows + min(num_pairs, num_experts)
        pairs = torch.full(
            (num_blocks * block_rows,), num_pairs, dtype=torch.int32, device=device
        ).scatter_(0, places, by_expert.to(torch.int32))
        begins = torch.arange(num_blocks, device=device) * block_rows
        experts = torch.searchsorted(ends, begins, right=True).to(torch.int32)
        return cls(pairs, experts, num_pairs, block_rows)


class ExpertSide:
    """One linear layer of every expert: [experts, outputs, inputs], all stored alike."""

    def __init__(
        self, weights: Sequence[Tensor] | Sequence[GroupedWeight], biases: Sequence[Tensor | None]
    ) -> None:
        """weights: all dense [outputs, inputs], or all coded

        Raises ValueError if they are not stored alike."""
        first = weights[0]
        numbers = [one.numbers if isinstance(one, GroupedWeight) else one for one in weights]
        of_fields: list[list[Tensor | None]] = [
            [getattr(one, name) if isinstance(one, GroupedWeight) else None for one in weights]
            for name in _FIELDS
        ]
        columns: list[Sequence[Tensor | None]] = [numbers, *of_fields, biases]
        self._distances = torch.stack([_distances(column) for column in columns], dim=1)
        self._distances = self._distances.to(numbers[0].device)
        self._weight = first
        self._bias = biases[0]
        self._keep = columns
        self.num_experts = len(weights)
        self.num_out, self.num_in = first.shape

    def multiply(
        self, x: Tensor, order: SortedPairs, out: Tensor, shares: Tensor | None = None
    ) -> None:
        """out [pairs, outputs] = the products of each pair's row of x, times its share.

        x       [rows, inputs], as many pairs as choices for each row
        shares  [pairs] fp32, or None: 1"""
        pairs_per_row = order.num_pairs // x.shape[0]
        _, block_n, num_warps = tile(order.block_rows)
        grid = (triton.cdiv(self.num_out, block_n), order.experts.shape[0])
        is_narrow = order.block_rows == 16
        weight = self._weight
        if isinstance(weight, Tensor):
            _dense_experts[grid](
                x, weight, self._bias, self._distances, order.pairs, order.experts, shares, out,
                order.num_pairs, self.num_out, self.num_in, x.stride(0), self.num_experts,
                PAIRS_PER_ROW=pairs_per_row, BLOCK_M=order.block_rows, BLOCK_N=block_n,
                BLOCK_K=_DENSE_INPUTS, num_warps=num_warps, num_stages=4 if is_narrow else 3,
            )  # fmt: skip
            return
        block_k = weight.block_inputs
        _coded_experts[grid](
            x, weight.numbers, weight.scales, weight.shifts, weight.minima, weight.out_scales,
            weight.table, self._bias, self._distances, order.pairs, order.experts, shares, out,
            order.num_pairs, self.num_out, self.num_in, weight.numbers.shape[0],
            weight.numbers.stride(0), weight.numbers.stride(1), x.stride(0), self.num_experts,
            PAIRS_PER_ROW=pairs_per_row, VALUES=weight.values, BITS=weight.bits, ZERO=weight.zero,
            GROUP=weight.group_inputs, BLOCK_K=block_k, BLOCK_M=order.block_rows, BLOCK_N=block_n,
            UNROLL=max(1, 128 // block_k) if is_narrow else 1, num_warps=num_warps,
            num_stages=5 if is_narrow else 3,
        )  # fmt: skip


class GroupedExperts:
    """As PackedExperts; nothing of a call waits for the device."""

    can_be_captured = True

    def __init__(
        self,
        gate_up: ExpertSide,
        down: ExpertSide,
        activate_and_mul: Callable[[Tensor], Tensor],
        tiles: TileChoice,
    ) -> None:
        self._tiles = tiles
        self._gate_up = gate_up
        self._down = down
        self._activate_and_mul = activate_and_mul

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        num_tokens, num_chosen = chosen.shape
        if num_tokens == 0:
            return torch.empty_like(x)
        num_pairs, device = num_tokens * num_chosen, x.device
        block_rows, *_ = self._tiles.of(num_pairs // self._gate_up.num_experts)
        order = SortedPairs.of(chosen, self._gate_up.num_experts, block_rows)
        gates = torch.empty((num_pairs, self._gate_up.num_out), dtype=x.dtype, device=device)
        self._gate_up.multiply(x if x.stride(1) == 1 else x.contiguous(), order, gates)
        shape = (num_pairs, self._down.num_out)
        results = torch.empty(shape, dtype=torch.float32, device=device)
        shares = weights.float().flatten()
        self._down.multiply(self._activate_and_mul(gates), order, results, shares)
        of_token = results.view(num_tokens, num_chosen, -1)
        if not self._tiles.fixed:
            return of_token.sum(dim=1).to(x.dtype)
        total = of_token[:, 0].clone()  # torch's sum may choose its order by the number of tokens
        for index in range(1, num_chosen):
            total += of_token[:, index]
        return total.to(x.dtype)


def pack_experts(
    gate_up: Sequence[PackedLinear],
    down: Sequence[PackedLinear],
    activate_and_mul: Callable[[Tensor], Tensor],
    tiles: TileChoice,
) -> PackedExperts:
    """As Kernels.pack_experts. Experts that are not stored alike are computed one by one."""
    torch_experts.check_experts(len(gate_up), len(down))
    sides = [_side_of(layers) for layers in (gate_up, down)]
    first, second = sides
    if first is None or second is None:
        return torch_experts.Experts(gate_up, down, activate_and_mul)
    return GroupedExperts(first, second, activate_and_mul, tiles)


def _side_of(layers: Sequence[PackedLinear]) -> ExpertSide | None:
    """None if the layers are not stored alike, or in a way that no kernel here reads."""
    dense = [one for one in layers if isinstance(one, DenseLinear)]
    coded = [one for one in layers if isinstance(one, QuantizedLinear)]
    if not layers or len(layers) not in (len(dense), len(coded)):
        return None
    try:
        if dense:
            whole = [one.weight.contiguous() for one in dense]
            return ExpertSide(whole, [one.bias for one in dense])
        weights = [one.grouped for one in coded]
        known = [one for one in weights if one is not None]
        if len(known) < len(weights) or not _are_alike(known):
            return None
        return ExpertSide(_of_one_dtype(known), [one.bias for one in coded])
    except ValueError:
        return None


def _are_alike(weights: Sequence[GroupedWeight]) -> bool:
    def kind(one: GroupedWeight) -> tuple[object, ...]:
        return (one.values, one.numbers.stride(), one.group_inputs, one.zero)

    first = weights[0]
    has_tables = first.table is not None
    return all(
        kind(one) == kind(first)
        and (one.table is not None) == has_tables
        and (one.table is None or first.table is None or torch.equal(one.table, first.table))
        for one in weights
    )


def _of_one_dtype(weights: Sequence[GroupedWeight]) -> list[GroupedWeight]:
    """The same with fp32 where scales, shifts or minima have different dtypes."""
    changed = list(weights)
    for name in _FIELDS:
        tensors = [getattr(one, name) for one in changed]
        if len({tensor.dtype for tensor in tensors if tensor is not None}) > 1:
            wide: list[dict[str, Any]] = [
                {name: None if tensor is None else tensor.float()} for tensor in tensors
            ]
            changed = [replace(one, **new) for one, new in zip(changed, wide, strict=True)]
    return changed


def _distances(tensors: Sequence[Tensor | None]) -> Tensor:
    """[experts] int64: entries from the first tensor to each; 0 if there are none.

    Raises ValueError if only some are there, or if they differ in more than their numbers."""
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return torch.zeros(len(tensors), dtype=torch.int64)
    first = present[0]
    alike = {(one.shape, one.stride(), one.dtype) for one in present}
    if len(present) < len(tensors) or len(alike) > 1:
        raise ValueError("experts are not stored alike")
    size = first.element_size()
    apart = [one.data_ptr() - first.data_ptr() for one in present]
    if any(distance % (size * _ALIGNED) for distance in apart):
        raise ValueError("experts' tensors do not begin at multiples of 16 entries")
    return torch.tensor([distance // size for distance in apart])
