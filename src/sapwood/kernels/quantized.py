"""Quantised weights of linear layers, in the form in which every implementation gets them.

Formats, with w the weight [out, in] that they stand for:

int8   numbers [out, in] int8 from -127 to 127, scales [out] fp32; w = number * its row's scale.
q8_0, q4_0, q4_1, q5_0, q5_1, iq4_nl   GGUF's blocks of 32 inputs, as in the file.
q2_k, q3_k, q4_k, q5_k, q6_k, iq4_xs   GGUF's blocks of 256 inputs, as in the file; the numbers that
       all of them stand for are in kernels/blocks.py.

Products: x is rounded to int8 when a layer is called, with one fp32 scale per row and group of
inputs, 64 of them (int8; fewer at the end of a row) or 32 (the others): scale = max |x| / 127,
number = x * (127 / max |x|) rounded half to even. With blocks whose `x_bits` are 16 there are 32384
steps instead of 127, which two digits of int8 in base 254 can count: twice the products of bytes.
Exact products of bfloat16 on a matrix unit of x86 round x of blocks whose scales are of 32 inputs
to whole multiples of a power of two instead: of 14 bits, or 12 where numbers have 8, so that
bfloat16 holds x still and fp32 the sums of a group. With fast products and many rows
blocks are decoded and x is not rounded. A max |x| below 1e-30 counts as zero.
Where x has NaN or an infinity, the group's scale is NaN, and so is that row of the result. Products
of numbers are summed exactly within a group of inputs that share a scale of x and a scale of w; the
rest is computed in fp32. Implementations that compute with dequantised weights say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.blocks import FORMATS, Decoded

INT8_GROUP_INPUTS = 64
"""Inputs that share a scale of x, for int8 weights. One scale per row costs ten times the accuracy:
3.4% of SmolLM2's perplexity instead of 0.4%."""
KINDS = ("int8", *FORMATS)
FINE_STEP, FINE_LEVELS = 254, 32384
"""Of an x in 16 bits: what its higher digit counts, and its levels above zero."""

PIECE_NUMBERS = 1 << 15
"""Numbers that torch works on at a time: as fp32 they stay in the cache, and one thread does them.

A larger piece would be shared among all threads. If another process keeps one of them off its core,
the others wait for milliseconds, and there are a thousand such pieces in a model.
"""


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight [out, in] in one of the formats above.

    data    int8: [out, in] int8; blocks: [out, blocks * bytes of a block] uint8
    scales  int8: [out] fp32; blocks: None
    x_bits  of the rounded x in products: 8, or of blocks also 16
    Raises  ValueError if they do not fit
    """

    kind: str
    shape: tuple[int, int]
    data: Tensor
    scales: Tensor | None = None
    x_bits: int = 8

    def __post_init__(self) -> None:
        num_out, num_in = self.shape
        if self.kind not in KINDS:
            raise ValueError(f"the kind is {self.kind!r} but must be one of {', '.join(KINDS)}")
        if self.x_bits not in ((8,) if self.kind == "int8" else (8, 16)):
            raise ValueError(f"products with {self.kind} weights have no x of {self.x_bits} bits")
        if self.kind == "int8":
            fits = self.scales is not None and self.scales.shape == (num_out,)
            wanted, dtype = (num_out, num_in), torch.int8
        else:
            blocks = FORMATS[self.kind]
            fits = self.scales is None and num_in % blocks.inputs == 0
            row_bytes = num_in // blocks.inputs * blocks.num_bytes
            wanted, dtype = (num_out, row_bytes), torch.uint8
        if not fits or self.data.shape != wanted or self.data.dtype != dtype:
            raise ValueError(
                f"{self.data.dtype} {list(self.data.shape)} is no {self.kind} weight of "
                f"{list(self.shape)}: it takes {dtype} {list(wanted)}"
            )

    @property
    def num_bytes(self) -> int:
        scales = 0 if self.scales is None else self.scales.numel() * 4
        return self.data.numel() + scales

    def stacks_with(self, other: QuantizedWeight) -> bool:
        """Whether one weight can have the outputs of both."""
        mine = self.kind, self.x_bits, self.shape[1]
        return mine == (other.kind, other.x_bits, other.shape[1])

    def rows(self, first: int, size: int) -> QuantizedWeight:
        """The weight of the outputs first .. first + size."""
        return self._cut(slice(first, first + size), size)

    def chosen(self, rows: Tensor) -> QuantizedWeight:
        """The weight of the outputs `rows` [n] int64, in this order."""
        return self._cut(rows, rows.numel())

    def _cut(self, rows: slice | Tensor, size: int) -> QuantizedWeight:
        scales = None if self.scales is None else self.scales[rows]
        return replace(self, shape=(size, self.shape[1]), data=self.data[rows], scales=scales)

    def columns(self, first: int, size: int) -> QuantizedWeight:
        """The weight of the inputs first .. first + size; ValueError if these cut a block."""
        if self.kind == "int8":
            return replace(
                self, shape=(self.shape[0], size), data=self.data[:, first : first + size]
            )
        blocks = FORMATS[self.kind]
        if first % blocks.inputs or size % blocks.inputs:
            raise ValueError(
                f"inputs {first} to {first + size} cut a block of {blocks.inputs} inputs of a "
                f"{self.kind} weight"
            )
        step = blocks.num_bytes
        start, width = first // blocks.inputs * step, size // blocks.inputs * step
        return replace(self, shape=(self.shape[0], size), data=self.data[:, start : start + width])

    def to(self, device: torch.device) -> QuantizedWeight:
        scales = None if self.scales is None else self.scales.to(device)
        return replace(self, data=self.data.to(device), scales=scales)

    def with_rows(self, num_rows: int) -> QuantizedWeight:
        """The weight with outputs that are zero added at its end, until it has `num_rows`."""
        more = num_rows - self.shape[0]
        if more == 0:
            return self
        return replace(
            self,
            shape=(num_rows, self.shape[1]),
            data=F.pad(self.data, (0, 0, 0, more)),
            scales=None if self.scales is None else F.pad(self.scales, (0, more)),
        )

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """w [out, in], computed in fp32 and rounded once."""
        out = torch.empty(self.shape, dtype=dtype, device=self.data.device)
        step = max(1, PIECE_NUMBERS // max(1, self.shape[1]))
        for first in range(0, self.shape[0], step):
            piece = self.rows(first, min(step, self.shape[0] - first))
            out[first : first + step] = piece._dequantized_fp32()
        return out

    def _dequantized_fp32(self) -> Tensor:
        if self.scales is not None:
            return self.data.float() * self.scales[:, None]
        numbers, scales, minima = self.unpacked()
        return (numbers * scales.unsqueeze(2) + minima.unsqueeze(2)).view(self.shape)

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Blocks as fp32: numbers [out, groups, inputs of a group], scales and minima
        [out, groups]; w = numbers * scale + minimum."""
        blocks, decoded = FORMATS[self.kind], self.decoded()
        num_out, groups = self.shape[0], self.shape[1] // blocks.group
        numbers = decoded.numbers.float().sub_(blocks.offset).view(num_out, groups, blocks.group)
        scales = _per_group(decoded.d, decoded.scales).view(num_out, groups)
        if decoded.least is None:
            return numbers, scales, torch.zeros_like(scales)
        return numbers, scales, _per_group(decoded.least, decoded.minima).view(num_out, groups)

    def decoded(self) -> Decoded:
        """Blocks as whole numbers, row after row."""
        blocks = FORMATS[self.kind]
        return blocks.decode(self.data.reshape(-1, blocks.num_bytes))


def _per_group(of_block: Tensor, of_group: Tensor | None) -> Tensor:
    """[B] fp16 and [B, groups] int8 -> their products, fp32."""
    wide = of_block.float()
    return wide if of_group is None else wide[:, None] * of_group.float()


def stacked(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight in the place of several of the same kind and inputs: their outputs in order."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if any(not first.stacks_with(other) for other in weights):
        raise ValueError("weights of different kinds or inputs cannot be stacked")
    scales = [weight.scales for weight in weights if weight.scales is not None]
    return replace(
        first,
        shape=(sum(weight.shape[0] for weight in weights), first.shape[1]),
        data=torch.cat([weight.data for weight in weights]),
        scales=torch.cat(scales) if scales else None,
    )


def grouped_by_kind(weights: Sequence[QuantizedWeight]) -> tuple[QuantizedWeight, ...]:
    """The same outputs in the same order, with neighbours of the same kind joined to one weight."""
    groups: list[list[QuantizedWeight]] = []
    for weight in weights:
        if groups and groups[-1][0].stacks_with(weight):
            groups[-1].append(weight)
        else:
            groups.append([weight])
    return tuple(stacked(group) for group in groups)
