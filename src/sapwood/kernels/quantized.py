"""Weights of linear layers as quantised numbers: what every implementation of the ops is given.

Formats, with w the weight [out, in] that they stand for:

int8   numbers [out, in] int8 from -127 to 127, scales [out] fp32; w = number * its row's scale.
q8_0   GGUF's blocks of 32 inputs, as in the file: an fp16 scale d, 32 int8; w = d * number.
q4_0   d, then 16 bytes: number i in the low half of byte i, number 16 + i in its high half;
       w = d * (number - 8).
q4_1   d, an fp16 minimum m, then 16 bytes likewise; w = d * number + m.

Products: x is rounded to int8 when a layer is called, with one fp32 scale per row and group of
inputs, 64 of them (int8; fewer at the end of a row) or 32 (the others): scale = max |x| / 127,
number = x * (127 / max |x|) rounded half to even. A max |x| below 1e-30 counts as zero. Where x has
NaN or an infinity, the group's scale is NaN, and so is that row of the result. Products of numbers
are summed exactly within a group; what is left is fp32. Implementations that compute with
dequantised weights say so.

Source of the blocks: the GGUF format, ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_INPUTS = 32
INT8_GROUP_INPUTS = 64
"""Inputs that share a scale of x, for int8 weights. One scale per row costs ten times the accuracy:
3.4% of SmolLM2's perplexity instead of 0.4%."""
BLOCK_BYTES = {"q8_0": 34, "q4_0": 18, "q4_1": 20}
KINDS = ("int8", *BLOCK_BYTES)

PIECE_NUMBERS = 1 << 15
"""Numbers that torch works on at a time: their fp32 stays in the cache, and torch does it in one
thread. Of more it gives every thread a share, and waiting for one that another process keeps off
its core takes milliseconds, a thousand times per model."""


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight [out, in] in one of the formats above.

    data    int8: [out, in] int8; blocks: [out, in / 32 * bytes of a block] uint8
    scales  int8: [out] fp32; blocks: None
    Raises  ValueError if they do not fit
    """

    kind: str
    shape: tuple[int, int]
    data: Tensor
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        num_out, num_in = self.shape
        if self.kind not in KINDS:
            raise ValueError(f"the kind is {self.kind!r} but must be one of {', '.join(KINDS)}")
        if self.kind == "int8":
            fits = self.scales is not None and self.scales.shape == (num_out,)
            wanted, dtype = (num_out, num_in), torch.int8
        else:
            fits = self.scales is None and num_in % BLOCK_INPUTS == 0
            row_bytes = num_in // BLOCK_INPUTS * BLOCK_BYTES[self.kind]
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

    def rows(self, first: int, size: int) -> QuantizedWeight:
        """Outputs first .. first + size."""
        scales = None if self.scales is None else self.scales[first : first + size]
        return replace(
            self,
            shape=(size, self.shape[1]),
            data=self.data[first : first + size],
            scales=scales,
        )

    def columns(self, first: int, size: int) -> QuantizedWeight:
        """Inputs first .. first + size; ValueError if they cut a block."""
        if self.kind == "int8":
            return replace(
                self, shape=(self.shape[0], size), data=self.data[:, first : first + size]
            )
        if first % BLOCK_INPUTS or size % BLOCK_INPUTS:
            raise ValueError(
                f"inputs {first} to {first + size} cut a block of {BLOCK_INPUTS} inputs of a "
                f"{self.kind} weight"
            )
        step = BLOCK_BYTES[self.kind]
        start, width = first // BLOCK_INPUTS * step, size // BLOCK_INPUTS * step
        return replace(self, shape=(self.shape[0], size), data=self.data[:, start : start + width])

    def to(self, device: torch.device) -> QuantizedWeight:
        scales = None if self.scales is None else self.scales.to(device)
        return replace(self, data=self.data.to(device), scales=scales)

    def with_rows(self, num_rows: int) -> QuantizedWeight:
        """The same, with outputs that are zero at its end so that there are `num_rows`."""
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
        """Blocks as fp32: numbers [out, blocks, 32], scales and minima [out, blocks];
        w = numbers * scale + minimum."""
        num_blocks = self.shape[1] // BLOCK_INPUTS
        blocks = self.data.reshape(self.shape[0], num_blocks, BLOCK_BYTES[self.kind])
        head = 4 if self.kind == "q4_1" else 2
        halves = blocks[..., :head].contiguous().view(torch.float16).float()
        scales, body = halves[..., 0], blocks[..., head:]
        if self.kind == "q8_0":
            numbers = body.contiguous().view(torch.int8).float()
            return numbers, scales, torch.zeros_like(scales)
        numbers = torch.cat((body & 15, body >> 4), dim=-1).float()
        if self.kind == "q4_0":
            return numbers - 8, scales, torch.zeros_like(scales)
        return numbers, scales, halves[..., 1]


def stacked(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights of one kind and with the same inputs, as one: outputs one after another."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if any(other.kind != first.kind or other.shape[1] != first.shape[1] for other in weights):
        raise ValueError("weights of different kinds or inputs cannot be stacked")
    scales = [weight.scales for weight in weights if weight.scales is not None]
    return QuantizedWeight(
        first.kind,
        (sum(weight.shape[0] for weight in weights), first.shape[1]),
        torch.cat([weight.data for weight in weights]),
        torch.cat(scales) if scales else None,
    )


def grouped_by_kind(weights: Sequence[QuantizedWeight]) -> tuple[QuantizedWeight, ...]:
    """The same outputs in the same order, neighbours of one kind stacked."""
    groups: list[list[QuantizedWeight]] = []
    for weight in weights:
        if groups and groups[-1][0].kind == weight.kind:
            groups[-1].append(weight)
        else:
            groups.append([weight])
    return tuple(stacked(group) for group in groups)
