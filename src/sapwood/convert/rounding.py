"""Rounding: the numbers that a scheme can store, and the search for the best scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sapwood.convert.scheme import BLOCK, E2M1_MAX, E4M3_MAX, WeightScheme
from sapwood.kernels.coded import VALUES

PIECE_NUMBERS = 1 << 18
"""Weights whose scales are searched at a time: a core's cache holds several times as many."""


@dataclass(frozen=True, slots=True)
class ScaleFormat:
    """The format in which scales are stored: numbers of a dtype, times a common factor."""

    dtype: torch.dtype
    factor: float = 1.0

    def nearest(self, scale: Tensor) -> Tensor:
        """The fp32 scale that will be read back. Never 0, because weights are divided by it."""
        return self.stored(scale).float() / self.factor

    def stored(self, scale: Tensor) -> Tensor:
        limits = torch.finfo(self.dtype)
        return (scale * self.factor).clamp(limits.tiny, limits.max).to(self.dtype)


def scale_format(scheme: WeightScheme, weight: Tensor, dtype: torch.dtype) -> ScaleFormat:
    """The format of a product's scales.

    weight  all parts of the product, which share a factor if the scheme has one per tensor
    dtype   dtype of the scales, if the scheme does not have a format of its own
    """
    if scheme.layout in ("awq", "gptq"):
        return ScaleFormat(torch.float16)
    if scheme.layout == "bitsandbytes":
        return ScaleFormat(torch.float32)
    if not scheme.is_e2m1:
        return ScaleFormat(dtype)
    if scheme.strategy == "group":
        return ScaleFormat(torch.float8_e8m0fnu)
    # The largest group's scale becomes half of E4M3's largest number: gptq may want larger weights
    # than these. The factor is what will be read: fp32.
    largest = weight.abs().max().item()
    factor = torch.tensor(E4M3_MAX / 2 * E2M1_MAX / (largest or 1.0), dtype=torch.float32)
    return ScaleFormat(torch.float8_e4m3fn, factor.item())


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that each weight of a matrix [out, in] can become: (code - zero) * scale.

    scale  [out, groups] fp32, each exactly a number of the format that it will be stored in
    zero   [out, groups] fp32, whole numbers; None: all 0
    """

    scheme: WeightScheme
    scales: ScaleFormat
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

    def rows(self, rows: slice) -> Grid:
        """The grid of some of the outputs."""
        zero = None if self.zero is None else self.zero[rows]
        return Grid(self.scheme, self.scales, self.scale[rows], zero)

    def group_of(self, num_columns: int) -> Tensor:
        """[num_columns] int64: the group of each input."""
        size = self.scheme.group_size or num_columns
        return torch.arange(num_columns, device=self.scale.device) // size


def nearest(scheme: WeightScheme, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The nearest codes, fp32; the shapes of scale and zero must be broadcastable to weight's."""
    codes = nearest_shifted(scheme, weight / scale, zero)
    return codes if zero is None else codes.add_(zero)


def nearest_shifted(scheme: WeightScheme, numbers: Tensor, zero: Tensor | None) -> Tensor:
    """The nearest of all numbers code - zero, fp32; `numbers` may be overwritten.

    numbers  fp32, weights divided by their scales
    zero     zero points, broadcastable to `numbers`
    """
    if scheme.numbers == "nf4":
        return nf4_values(numbers.device)[nf4_indices(numbers)]
    if scheme.is_float:
        numbers.clamp_(scheme.lowest, scheme.highest)
        return _nearest_e2m1(numbers) if scheme.is_e2m1 else numbers.to(torch.float8_e4m3fn).float()
    numbers.round_()
    if zero is None:
        return numbers.clamp_(scheme.lowest, scheme.highest)
    return numbers.clamp_(scheme.lowest - zero, scheme.highest - zero)


def _nearest_e2m1(numbers: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; ties go to the even code."""
    sizes = numbers.abs()
    steps = torch.where(sizes < 2.0, 0.5, torch.where(sizes < 4.0, 1.0, 2.0))
    return (numbers / steps).round_().mul_(steps)


def nf4_indices(numbers: Tensor) -> Tensor:
    """Indices of the nearest of NF4's sixteen values, int64."""
    return torch.bucketize(numbers, _nf4(numbers.device)[1])


def nf4_values(device: torch.device) -> Tensor:
    """[16] fp32, ascending."""
    return _nf4(device)[0]


@cache
def _nf4(device: torch.device) -> tuple[Tensor, Tensor]:
    """(NF4's values, the middles between neighbouring values)"""
    values = torch.tensor(VALUES["nf4"], device=device)
    return values, (values[1:] + values[:-1]) / 2


def choose_grid(
    weight: Tensor,
    scheme: WeightScheme,
    *,
    importance: Tensor | None,
    scales: ScaleFormat,
    shares: Sequence[float] | None = None,
) -> Grid:
    """The grid with the smallest squared error, among scales for several shares of the range.

    weight      [out, in] fp32
    importance  [in]: how much an error in each input's weights counts; None: all the same
    shares      shares of the range to try; None: those that are worthwhile for the scheme
    """
    if scheme.strategy == "block":
        return Grid(scheme, scales, _block_scales(weight, scheme, scales), None)
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
        _search(piece, scheme, counts.repeat(len(piece) // per_row, 1), scales, shares)
        for piece in torch.split(weights, step)
    ]
    scale, zero = (
        torch.cat([piece[index] for piece in pieces]).view(num_rows, per_row) for index in (0, 1)
    )
    return Grid(scheme, scales, scale, None if scheme.symmetric else zero)


def _search(
    weights: Tensor,
    scheme: WeightScheme,
    counts: Tensor,
    scales: ScaleFormat,
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
            scale, zero = scales.nearest(scale), None
        else:
            scale = (high - low) * (share / (scheme.highest - scheme.lowest))
            scale = scales.nearest(scale)
            zero = (scheme.lowest - low * share / scale).round_()
            zero = zero.clamp_(scheme.lowest_zero, scheme.highest)
        column = None if zero is None else zero[:, None]
        values = nearest_shifted(scheme, weights / scale[:, None], column)
        error = (values * scale[:, None] - weights).square_().mul_(counts).sum(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _shares(scheme: WeightScheme) -> list[float]:
    """Shares of the range to try.

    Codes of 4 bits gain most from a shorter range. A share of 0.875 lets -8, of -8 … 7, be the
    largest number. Floats need no shorter range, because their steps shrink with the numbers; but
    the steps double at every power of two, and it matters where these powers fall. E2M1 has so few
    numbers that a shorter range can be better too, or a range whose largest number is 4 and not 6.
    """
    if scheme.is_e2m1 and scheme.strategy == "group":
        return [0.5, 1.0, 2.0]  # rounded to powers of two
    if scheme.is_e2m1:
        return [0.7 + 0.05 * step for step in range(19)]
    if scheme.is_float:
        return [2.0 ** (step / 8) for step in range(8)]
    if scheme.num_bits == 8:
        return [1.0 - 0.02 * step for step in range(11)]
    return [1.0 - 0.025 * step for step in range(21)]


def _block_scales(weight: Tensor, scheme: WeightScheme, scales: ScaleFormat) -> Tensor:
    num_rows, num_columns = weight.shape
    blocks = weight.view(num_rows // BLOCK, BLOCK, num_columns // BLOCK, BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    return scales.nearest(largest / scheme.highest).repeat_interleave(BLOCK, dim=0)
