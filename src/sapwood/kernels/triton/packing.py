"""Puts quantised weights into the layout of `grouped_matmul`, once, when they are loaded.

Every format takes as much memory as before, except that numbers of 5 and 6 bits take 8 bits, and
numbers of 2 and 3 bits take 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.blocks import FORMATS, NONLINEAR_LEVELS
from sapwood.kernels.coded import NF4, CodedWeight
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.kernels.triton.grouped_matmul import GroupedWeight, Values

_LEAST_WIDTH = 16
"""Inputs of a matrix product at least."""

_MOST_BYTES = {8: 64, 4: 32}
"""Bits -> bytes of a block and output: more would not leave room for the pipeline of the widest
tiles."""

_FOUR_BITS = ("q4_0", "q4_1", "q4_k", "q2_k", "q3_k")
_NONLINEAR = ("iq4_nl", "iq4_xs")


def packed_blocks(weight: QuantizedWeight) -> GroupedWeight:
    """The packed form of GGUF's blocks, of any type; int8 weights have another layout."""
    of, decoded = FORMATS[weight.kind], weight.decoded()
    num_out, num_in = weight.shape
    numbers = decoded.numbers.view(num_out, num_in)
    zero, table = 0, None
    values: Values = "int8"
    if weight.kind in _FOUR_BITS:
        values, zero = "int4", of.offset
    elif weight.kind in _NONLINEAR:
        values = "table"
        levels = torch.tensor(NONLINEAR_LEVELS, device=numbers.device)
        numbers = torch.searchsorted(levels, numbers.int() - of.offset).to(torch.uint8)
        table = levels.float()
    else:
        numbers = (numbers.to(torch.int16) - of.offset).to(torch.int8).view(torch.uint8)

    def per_group(of_block: Tensor, of_group: Tensor | None) -> Tensor:
        wide = of_block if of_group is None else of_block.float()[:, None] * of_group.float()
        return _narrowest(wide.float().view(num_out, -1))

    return GroupedWeight(
        values=values,
        shape=weight.shape,
        numbers=_packed(numbers, _bits(values), of.group),
        group_inputs=of.group,
        scales=per_group(decoded.d, decoded.scales),
        minima=None if decoded.least is None else per_group(decoded.least, decoded.minima),
        table=table,
        zero=zero,
    )


def packed_codes(weight: CodedWeight) -> GroupedWeight:
    """The packed form of coded weights; the caller takes care of their `order`."""
    num_in = weight.shape[1]
    values: Values = "table" if weight.codes == "nf4" else weight.codes  # type: ignore[assignment]
    bits = _bits(values)
    codes = weight.data
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)[:, :num_in]
    group, scales, out_scales = weight.group_inputs, weight.scales, weight.out_scales
    has_one_group = group >= num_in
    if has_one_group and weight.shifts is None:
        # The sum is scaled instead: the values are exact in every dtype, but for nf4's.
        group = 0
        out_scales = scales[:, 0] if out_scales is None else scales[:, 0] * out_scales
    elif has_one_group:
        group = _MOST_BYTES[8] * -(-num_in // _MOST_BYTES[8])
    return GroupedWeight(
        values=values,
        shape=weight.shape,
        numbers=_packed(codes, bits, group),
        group_inputs=group,
        scales=_narrowest(scales) if group else None,
        shifts=None if weight.shifts is None else _narrowest(weight.shifts),
        out_scales=None if out_scales is None else out_scales.contiguous(),
        table=torch.tensor(NF4, device=codes.device) if weight.codes == "nf4" else None,
        zero=8 if values == "int4" else 0,
    )


def _bits(values: Values) -> int:
    return 8 if values in ("int8", "e4m3") else 4


def _packed(codes: Tensor, bits: int, group: int) -> Tensor:
    """codes [out, in] uint8 -> [blocks, out, bytes]; see GroupedWeight."""
    num_out, num_in = codes.shape
    width = _width(bits, group)
    block = width * 8 // bits
    filled = F.pad(codes, (0, -num_in % block)).view(num_out, -1, 8 // bits, width)
    parts = filled.unbind(2)
    numbers = parts[0] if bits == 8 else parts[0] | parts[1] << 4
    return numbers.transpose(0, 1).contiguous()


def _width(bits: int, group: int) -> int:
    """Number of inputs that are multiplied at a time: one group's, if groups are wide enough."""
    width = min(_MOST_BYTES[bits], group & -group) if group else _MOST_BYTES[bits]
    return width if width >= _LEAST_WIDTH else _MOST_BYTES[4]


def _narrowest(numbers: Tensor) -> Tensor:
    """[out, groups] fp32 -> [groups, out], in 16 bits if a dtype of 16 bits holds all numbers."""
    across = numbers.T.contiguous()
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(across.to(dtype).float(), across):
            return across.to(dtype)
    return across
