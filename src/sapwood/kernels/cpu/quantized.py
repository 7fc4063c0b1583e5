"""Linear layers with quantised weights, packed for the compiled module (csrc/quantized.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sapwood.kernels.blocks import BLOCK_INPUTS, FORMATS
from sapwood.kernels.coded import CodedWeight, LinearPart, neighbours_stacked
from sapwood.kernels.cpu import _native
from sapwood.kernels.large_pages import WeightMemory
from sapwood.kernels.quantized import PIECE_NUMBERS, QuantizedWeight
from sapwood.kernels.reference.quantized import quantize

WEIGHT_KINDS: dict[str | torch.dtype, int] = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    "int8": 3,
    "q8_0": 4,
    "q4_0": 5,
    "q4_1": 6,
    "q5_0": 7,
    "q5_1": 8,
    "q2_k": 9,
    "q3_k": 10,
    "q4_k": 11,
    "q5_k": 12,
    "q6_k": 13,
    "iq4_xs": 14,
    "iq4_nl": 4,  # bytes with a scale per 32 inputs, as q8_0
}
"""As WeightKind in csrc/ops.h numbers them."""

CODES = {"int4": 0, "fp4": 1, "nf4": 2, "int8": 3, "e4m3": 4}
"""As Codes in csrc/coded.h numbers them."""

UNPACKED_NUMBERS = 1 << 18
"""Of blocks at a time, so that a weight is not held in bytes beside its blocks."""


class QuantizedLinear:
    """One linear layer: a chain of packed weights, one per layout among its parts.

    Raises ValueError if the parts or the bias do not fit each other.
    """

    def __init__(
        self,
        context: _native.Context,
        memory: WeightMemory,
        parts: Sequence[LinearPart],
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        code: int,
    ) -> None:
        """`code` is the compiled module's number of `dtype`."""
        num_in = {part.shape[1] for part in parts}
        if len(num_in) != 1:
            raise ValueError(f"the parts of a layer have different inputs: {sorted(num_in)}")
        self._context = context
        self._memory = memory
        self._dtype = dtype
        self._code = code
        self._num_in = num_in.pop()
        self._num_out = sum(part.shape[0] for part in parts)
        if bias is not None and (bias.dtype != dtype or bias.numel() != self._num_out):
            raise ValueError(f"the bias must be [{self._num_out}] of {dtype}")
        self._has_bias = bias is not None
        self._keep = [] if bias is None else [bias.contiguous()]
        bias_address = 0 if bias is None else self._keep[0].data_ptr()
        weight: _native.LinearWeight | None = None
        first = self._num_out
        for part in reversed(neighbours_stacked(parts)):
            first -= part.shape[0]
            address = bias_address and bias_address + first * dtype.itemsize
            if isinstance(part, CodedWeight):
                weight = self._packed_codes(part, address, weight)
            else:
                weight = self._packed(part, address, weight)
        assert weight is not None
        self._weight = weight

    def _packed(
        self,
        part: QuantizedWeight,
        bias_address: int,
        following: _native.LinearWeight | None,
    ) -> _native.LinearWeight:
        kind = WEIGHT_KINDS[part.kind]
        num_out, num_in = part.shape
        num_bytes = _native.packed_bytes(kind, num_out, num_in)
        packed = self._memory.empty((num_bytes,), torch.uint8)
        if part.kind == "int8":
            numbers = part.data.contiguous()
            _native.pack_int8(numbers.data_ptr(), packed.data_ptr(), num_out, num_in)
        else:
            _pack_blocks(part, packed)
        self._keep.append(packed)
        scales_address = self._whole_panels(part.scales)
        return _native.LinearWeight(
            kind, packed.data_ptr(), scales_address, bias_address, num_out, num_in, self._num_out,
            following, fine=part.x_bits == 16,
        )  # fmt: skip

    def _packed_codes(
        self, part: CodedWeight, bias_address: int, following: _native.LinearWeight | None
    ) -> _native.LinearWeight:
        num_out, num_in = part.shape
        scales = _showing_nan(part).contiguous()
        # Half as large; bf16 has all e4m3 and e8m0 numbers, and those that were bf16 before.
        narrow = torch.equal(scales.bfloat16().float(), scales)
        shifts = None if part.shifts is None else part.shifts.contiguous()
        order = None if part.order is None else part.order.contiguous()
        layout = _native.CodedLayout(
            CODES[part.codes], num_in, part.group_inputs, narrow, shifts is not None,
            0 if order is None else order.data_ptr(),
        )  # fmt: skip
        packed = self._memory.empty((layout.packed_bytes(num_out),), torch.uint8)
        codes = part.data.contiguous()
        _native.pack_coded(
            layout, codes.data_ptr(), scales.data_ptr(),
            0 if shifts is None else shifts.data_ptr(), num_out, packed.data_ptr(),
        )  # fmt: skip
        self._keep += [packed] if order is None else [packed, order]
        return _native.LinearWeight(
            layout, packed.data_ptr(), self._whole_panels(part.out_scales), bias_address, num_out,
            self._num_out, following,
        )  # fmt: skip

    def _whole_panels(self, numbers: Tensor | None) -> int:
        """The address of a copy of numbers [outputs] that is filled up with zeros; None: 0."""
        if numbers is None:
            return 0
        whole = torch.zeros(-(-numbers.numel() // _native.PANEL) * _native.PANEL)
        whole[: numbers.numel()] = numbers
        self._keep.append(whole)
        return whole.data_ptr()

    @property
    def dtype(self) -> torch.dtype:
        """Of x and of the result."""
        return self._dtype

    @property
    def sizes(self) -> tuple[int, int]:
        """(outputs, inputs)"""
        return self._num_out, self._num_in

    @property
    def native_weight(self) -> _native.LinearWeight:
        """What C++ computes this layer with; valid as long as this layer lives."""
        return self._weight

    def __call__(self, x: Tensor) -> Tensor:
        x, x_stride = self._rows_of(x)
        out = x.new_empty((x.shape[0], self._num_out))
        _native.linear_any(
            self._context, self._weight, self._code, x.data_ptr(), x_stride, x.shape[0],
            out.data_ptr(),
        )  # fmt: skip
        return out

    def fp32(self, x: Tensor) -> Tensor:
        if self._has_bias:
            return self(x).float()  # the bias has x's dtype
        x, x_stride = self._rows_of(x)
        out = torch.empty((x.shape[0], self._num_out))
        _native.linear_fp32(
            self._context, self._weight, self._code, x.data_ptr(), x_stride, x.shape[0],
            out.data_ptr(),
        )  # fmt: skip
        return out

    def unpacked(self) -> None:
        return None

    def refill(self, weight: Tensor) -> bool:
        return False

    def _rows_of(self, x: Tensor) -> tuple[Tensor, int]:
        """x and the entries between its rows, in which entries lie one after another."""
        num_in = x.shape[1]
        if num_in != self._num_in or x.dtype != self._dtype:
            raise ValueError(
                f"x {list(x.shape)} {x.dtype} does not fit a quantised weight "
                f"[{self._num_out}, {self._num_in}] for {self._dtype}"
            )
        x_stride, entry_stride = x.stride()
        return (x, x_stride) if entry_stride == 1 else (x.contiguous(), num_in)


def _showing_nan(part: CodedWeight) -> Tensor:
    """The scales, NaN for outputs that have a NaN among their codes: the kernels decode finite
    numbers only."""
    if part.codes != "e4m3":
        return part.scales
    step = max(1, PIECE_NUMBERS // part.shape[1])
    is_bad = torch.cat([((piece & 127) == 127).any(1) for piece in torch.split(part.data, step)])
    return part.scales.masked_fill(is_bad[:, None], torch.nan) if is_bad.any() else part.scales


def _pack_blocks(weight: QuantizedWeight, packed: Tensor) -> None:
    """Panels of outputs, several at a time, into `packed` (csrc/quantized.h)."""
    kind, (num_out, num_in) = WEIGHT_KINDS[weight.kind], weight.shape
    step = max(1, UNPACKED_NUMBERS // (num_in * _native.PANEL)) * _native.PANEL
    for first in range(0, num_out, step):
        piece = weight.rows(first, min(step, num_out - first))
        found = piece.decoded()
        arrays = [found.numbers, found.d, found.scales, found.least, found.minima]
        whole = [None if array is None else array.contiguous() for array in arrays]
        numbers, d, scales, least, minima = (
            0 if array is None else array.data_ptr() for array in whole
        )
        start = packed.data_ptr() + _native.packed_bytes(kind, first, num_in)
        _native.pack_blocks(kind, numbers, d, scales, least, minima, start, piece.shape[0], num_in)


def quantize_weight(
    context: _native.Context, weight: Tensor, kind: str, code: int | None
) -> QuantizedWeight:
    """As Kernels.quantize_weight; `code` is the compiled module's number of the weight's dtype."""
    num_out, num_in = weight.shape
    is_int8 = kind == "int8"
    is_here = is_int8 or (kind in ("q8_0", "q4_1") and num_in % BLOCK_INPUTS == 0)
    if not is_here or code is None or not weight.is_cpu:
        return quantize(weight, kind)
    weight = weight.contiguous()
    if is_int8:
        data = torch.empty(num_out, num_in, dtype=torch.int8)
    else:
        row_bytes = num_in // BLOCK_INPUTS * FORMATS[kind].num_bytes
        data = torch.empty(num_out, row_bytes, dtype=torch.uint8)
    scales = torch.empty(num_out) if is_int8 else None
    _native.quantize(
        context, WEIGHT_KINDS[kind], code, weight.data_ptr(), data.data_ptr(),
        0 if scales is None else scales.data_ptr(), num_out, num_in,
    )  # fmt: skip
    return QuantizedWeight(kind, (num_out, num_in), data, scales)
