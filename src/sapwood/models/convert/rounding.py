"""Weights to codes and back: the numbers that a scheme can store, and which scales fit best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.models.convert.scheme import BLOCK, PACKED_BITS, WeightScheme

PIECE_NUMBERS = 1 << 18
"""Weights whose scales are searched at once: what a core's cache holds several times."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that each weight of a matrix [out, in] can become: (code - zero) * scale.

    scale  [out, groups] fp32, each exactly a number of the dtype that it will be stored in
    zero   [out, groups] fp32, whole numbers; None: all 0
    """

    scheme: WeightScheme
    scale: Tensor
    zero: Tensor | None

    def codes(self, weight: Tensor) -> Tensor:
        """weight [out, in] fp32 -> the nearest codes [out, in], fp32."""
        group = self.group_of(weight.shape[1])
        zero = None if self.zero is None else self.zero[:, group]
        return nearest(self.scheme, weight, self.scale[:, group], zero)

    def values(self, codes: Tensor) -> Tensor:
        """codes [out, in] fp32 -> weights, fp32."""
        group = self.group_of(codes.shape[1])
        shifted = codes if self.zero is None else codes - self.zero[:, group]
        return shifted * self.scale[:, group]

    def group_of(self, num_columns: int) -> Tensor:
        """[num_columns] int64: the group of each input."""
        size = self.scheme.group_size or num_columns
        return torch.arange(num_columns, device=self.scale.device) // size


def nearest(scheme: WeightScheme, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The nearest codes, fp32; scale and zero are of a shape that goes with weight's."""
    codes = weight / scale
    if scheme.is_float:
        return codes.clamp_(scheme.lowest, scheme.highest).to(torch.float8_e4m3fn).float()
    codes.round_()
    if zero is not None:
        codes += zero
    return codes.clamp_(scheme.lowest, scheme.highest)


def choose_grid(
    weight: Tensor,
    scheme: WeightScheme,
    *,
    importance: Tensor | None,
    dtype: torch.dtype,
    shares: Sequence[float] | None = None,
) -> Grid:
    """The scales with the smallest squared error, of those that `_shares` has.

    weight      [out, in] fp32
    importance  [in]: how much an error of each input's weights counts; None: all the same
    dtype       what scales will be stored in
    shares      of the range, to try; None: those that pay for the scheme
    """
    if scheme.strategy == "block":
        return Grid(scheme, _block_scales(weight, scheme, dtype), None)
    num_rows, num_columns = weight.shape
    size = scheme.group_size or num_columns
    weights = weight.view(-1, size)
    counts = torch.ones(1, size, device=weight.device)
    if importance is not None:
        counts = importance.float().view(-1, size)
    per_row = num_columns // size
    counts = counts.expand(per_row, size)
    # Whole rows per piece, so that each piece meets every input's importance in order.
    step = max(1, PIECE_NUMBERS // num_columns) * per_row
    shares = shares or _shares(scheme)
    pieces = [
        _search(piece, scheme, counts.repeat(len(piece) // per_row, 1), dtype, shares)
        for piece in torch.split(weights, step)
    ]
    scale, zero = (
        torch.cat([piece[index] for piece in pieces]).view(num_rows, per_row) for index in (0, 1)
    )
    return Grid(scheme, scale, None if scheme.symmetric else zero)


def _search(
    weights: Tensor,
    scheme: WeightScheme,
    counts: Tensor,
    dtype: torch.dtype,
    shares: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [groups] of weights [groups, size]."""
    low = weights.amin(dim=1).clamp_(max=0.0)
    high = weights.amax(dim=1).clamp_(min=0.0)
    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for share in shares:
        if scheme.symmetric:
            scale = torch.maximum(-low, high) * (share / scheme.highest)
            scale, zero = stored_scale(scale, dtype), None
        else:
            scale = (high - low) * (share / (scheme.highest - scheme.lowest))
            scale = stored_scale(scale, dtype)
            zero = (scheme.lowest - low * share / scale).round_()
            zero = zero.clamp_(scheme.lowest, scheme.highest)
        column = None if zero is None else zero[:, None]
        values = nearest(scheme, weights, scale[:, None], column)
        if column is not None:
            values -= column
        error = (values * scale[:, None] - weights).square_().mul_(counts).sum(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _shares(scheme: WeightScheme) -> list[float]:
    """Shares of the range to try. 4 bits gain most from a shorter one. 0.875 lets -8 of -8 … 7 be
    the largest number. A float has no need of a shorter one, as its steps shrink with the numbers;
    but they double at every power of two, and where those lie makes a difference."""
    if scheme.is_float:
        return [2.0 ** (step / 8) for step in range(8)]
    if scheme.num_bits == 8:
        return [1.0 - 0.02 * step for step in range(11)]
    return [1.0 - 0.025 * step for step in range(21)]


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As it will be read back; never 0, which nothing could be divided by."""
    return scale.clamp(min=torch.finfo(dtype).tiny).to(dtype).float()


def _block_scales(weight: Tensor, scheme: WeightScheme, dtype: torch.dtype) -> Tensor:
    num_rows, num_columns = weight.shape
    blocks = weight.view(num_rows // BLOCK, BLOCK, num_columns // BLOCK, BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    return stored_scale(largest / scheme.highest, dtype).repeat_interleave(BLOCK, dim=0)


def stored_tensors(codes: Tensor, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a checkpoint holds of one layer: "weight" or "weight_packed", "weight_scale", …

    codes  [out, in] fp32
    dtype  of the scales
    """
    scheme = grid.scheme
    scale = grid.scale[::BLOCK] if scheme.strategy == "block" else grid.scale
    scales = {"weight_scale": scale.to(dtype).contiguous()}
    if scheme.is_float:
        return {"weight": codes.to(torch.float8_e4m3fn), **scales}
    if scheme.rounds_activations:
        return {"weight": codes.to(torch.int8), **scales}
    found = {
        "weight_packed": pack(codes.to(torch.int32), scheme),
        **scales,
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if grid.zero is not None:
        packed = pack(grid.zero.t().to(torch.int32), scheme)
        found["weight_zero_point"] = packed.t().contiguous()
    return found


def pack(codes: Tensor, scheme: WeightScheme) -> Tensor:
    """codes [rows, n] int32, whole words of them -> [rows, n * num_bits / 32] int32.

    The first code is in a word's lowest bits; codes are stored from 0 on, the lowest as 0."""
    per_word = PACKED_BITS // scheme.num_bits
    words = (codes - int(scheme.lowest)).view(codes.shape[0], -1, per_word)
    shifts = torch.arange(per_word, device=codes.device, dtype=torch.int32) * scheme.num_bits
    # Codes share no bits, so their sum is their union.
    return (words << shifts).sum(dim=2, dtype=torch.int32)
