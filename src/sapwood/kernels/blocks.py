"""GGUF's blocks: how each type stores the weights of a row, and how to decode them.

A block holds the weights of 32 or 256 neighbouring inputs of one output. Whatever the type,

    w = d * scale * (number - offset) + least * minimum

with fp16 d and least per block, and small integers: number per input, scale and minimum per group
of 16 or 32 inputs. The types of 32 inputs have one group and no integers for it: scale and minimum
count as 1. Products of an fp16 and an integer of 8 bits are exact in fp32, so nothing is lost.

Source: ggml-org/ggml, docs/gguf.md and ggml-common.h; tests compare with the gguf library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_INPUTS = 32
"""Inputs of a block without groups; the blocks of the other types have a multiple of this."""

NONLINEAR_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The numbers that the sixteen codes of IQ4 stand for."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """The whole numbers in some blocks, of which there are B.

    numbers  [B, inputs] uint8
    d        [B] fp16
    scales   [B, groups] int8; None: 1
    least    [B] fp16; None: the type has no minimum
    minima   [B, groups] int8; None: 1
    """

    numbers: Tensor
    d: Tensor
    scales: Tensor | None = None
    least: Tensor | None = None
    minima: Tensor | None = None


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One type of blocks.

    inputs     inputs of a block
    num_bytes  bytes of a block
    group      inputs that share a scale
    offset     the number that stands for zero
    decode     bytes of blocks [B, num_bytes] uint8 -> Decoded
    """

    inputs: int
    num_bytes: int
    group: int
    offset: int
    decode: Callable[[Tensor], Decoded]


def _halves(blocks: Tensor, first: int) -> Tensor:
    return blocks[:, first : first + 2].contiguous().view(torch.float16).squeeze(1)


def _split(packed: Tensor, bits: int, count: int) -> Tensor:
    """[B, n, m] bytes -> [B, n, count, m]: `count` numbers of `bits` bits, the lowest first."""
    shifts = torch.arange(0, bits * count, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(2) >> shifts[:, None]) & ((1 << bits) - 1)


def _nibbles(packed: Tensor, pieces: int) -> Tensor:
    """[B, bytes] -> [B, 2 * bytes]; within each piece, all low halves come before the high ones."""
    num = len(packed)
    return _split(packed.reshape(num, pieces, -1), 4, 2).reshape(num, -1)


def _top_bits(packed: Tensor) -> Tensor:
    """[B, 4] bytes -> [B, 32]: bit i of the 32 belongs to input i."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(2) >> shifts) & 1).reshape(len(packed), 32)


def _q8_0(blocks: Tensor) -> Decoded:
    return Decoded(blocks[:, 2:] ^ 128, _halves(blocks, 0))


def _q4_0(blocks: Tensor) -> Decoded:
    return Decoded(_nibbles(blocks[:, 2:], 1), _halves(blocks, 0))


def _q4_1(blocks: Tensor) -> Decoded:
    return Decoded(_nibbles(blocks[:, 4:], 1), _halves(blocks, 0), least=_halves(blocks, 2))


def _q5_0(blocks: Tensor) -> Decoded:
    numbers = _nibbles(blocks[:, 6:], 1) | _top_bits(blocks[:, 2:6]) << 4
    return Decoded(numbers, _halves(blocks, 0))


def _q5_1(blocks: Tensor) -> Decoded:
    numbers = _nibbles(blocks[:, 8:], 1) | _top_bits(blocks[:, 4:8]) << 4
    return Decoded(numbers, _halves(blocks, 0), least=_halves(blocks, 2))


def _iq4_nl(blocks: Tensor) -> Decoded:
    return Decoded(_levels(_nibbles(blocks[:, 2:], 1)), _halves(blocks, 0))


def _q2_k(blocks: Tensor) -> Decoded:
    num, scales = len(blocks), blocks[:, :16]
    return Decoded(
        _split(blocks[:, 16:80].reshape(num, 2, 32), 2, 4).reshape(num, 256),
        _halves(blocks, 80),
        scales=(scales & 15).view(torch.int8),
        least=-_halves(blocks, 82),
        minima=(scales >> 4).view(torch.int8),
    )


def _q3_k(blocks: Tensor) -> Decoded:
    num, packed = len(blocks), blocks[:, 96:108]
    low = _split(blocks[:, 32:96].reshape(num, 2, 32), 2, 4).reshape(num, 256)
    high = _split(blocks[:, :32].reshape(num, 1, 32), 1, 8).reshape(num, 256)
    low_scales = _nibbles(packed[:, :8], 1)
    high_scales = _split(packed[:, 8:].reshape(num, 1, 4), 2, 4).reshape(num, 16)
    scales = (low_scales | high_scales << 4).view(torch.int8) - 32
    return Decoded(low | high << 2, _halves(blocks, 108), scales=scales)


def _k_heads(blocks: Tensor, numbers: Tensor) -> Decoded:
    """What Q4_K and Q5_K begin with: d, least, and 16 six-bit integers in 12 bytes."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, third & 15 | first >> 2 & 48), dim=1)
    minima = torch.cat((second & 63, third >> 4 | second >> 2 & 48), dim=1)
    return Decoded(
        numbers,
        _halves(blocks, 0),
        scales=scales.view(torch.int8),
        least=-_halves(blocks, 2),
        minima=minima.view(torch.int8),
    )


def _q4_k(blocks: Tensor) -> Decoded:
    return _k_heads(blocks, _nibbles(blocks[:, 16:], 4))


def _q5_k(blocks: Tensor) -> Decoded:
    num = len(blocks)
    high = _split(blocks[:, 16:48].reshape(num, 1, 32), 1, 8).reshape(num, 256)
    return _k_heads(blocks, _nibbles(blocks[:, 48:], 4) | high << 4)


def _q6_k(blocks: Tensor) -> Decoded:
    num = len(blocks)
    high = _split(blocks[:, 128:192].reshape(num, 2, 32), 2, 4).reshape(num, 256)
    numbers = _nibbles(blocks[:, :128], 2) | high << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    return Decoded(numbers, _halves(blocks, 208), scales=scales)


def _iq4_xs(blocks: Tensor) -> Decoded:
    num = len(blocks)
    high = _split(blocks[:, 2:4].reshape(num, 2, 1), 2, 4).reshape(num, 8)
    low = _split(blocks[:, 4:8].reshape(num, 4, 1), 4, 2).reshape(num, 8)
    scales = (low | high << 4).view(torch.int8) - 32
    return Decoded(_levels(_nibbles(blocks[:, 8:], 8)), _halves(blocks, 0), scales=scales)


def _levels(codes: Tensor) -> Tensor:
    table = torch.tensor([level + 128 for level in NONLINEAR_LEVELS], device=codes.device)
    return table.to(torch.uint8)[codes.int()]


FORMATS: Mapping[str, BlockFormat] = {
    "q8_0": BlockFormat(32, 34, 32, 128, _q8_0),
    "q4_0": BlockFormat(32, 18, 32, 8, _q4_0),
    "q4_1": BlockFormat(32, 20, 32, 0, _q4_1),
    "q5_0": BlockFormat(32, 22, 32, 16, _q5_0),
    "q5_1": BlockFormat(32, 24, 32, 0, _q5_1),
    "iq4_nl": BlockFormat(32, 18, 32, 128, _iq4_nl),
    "q2_k": BlockFormat(256, 84, 16, 0, _q2_k),
    "q3_k": BlockFormat(256, 110, 16, 4, _q3_k),
    "q4_k": BlockFormat(256, 144, 32, 0, _q4_k),
    "q5_k": BlockFormat(256, 176, 32, 0, _q5_k),
    "q6_k": BlockFormat(256, 210, 16, 32, _q6_k),
    "iq4_xs": BlockFormat(256, 136, 32, 128, _iq4_xs),
}
"""The block formats by GGUF's name, in lower case."""
