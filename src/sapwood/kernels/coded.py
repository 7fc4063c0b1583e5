"""Weights that are codes times scales, multiplied with activations as they are.

With v the value of a code, w = (v + shift) * scale * output scale. Codes:

int4  0 to 15, v = code - 8
fp4   E2M1: a sign, then 0, 0.5, 1, 1.5, 2, 3, 4, 6
nf4   16 quantiles of the normal distribution (NormalFloat)
int8  the bits of an int8
e4m3  the bits of a float8 E4M3 (finite numbers and NaN)

Products: sums of x * v in fp32, group by group, then shift * (sum of x), scale, output scale. x has
the model's dtype. With bfloat16 the values are bfloat16 too, which all of them are exactly but for
nf4's, rounded once (2**-9 of the value). Implementations that compute with dequantised weights say
so.

Sources: OCP Microscaling Formats v1.0 (E2M1, E4M3); Dettmers et al. 2023, arXiv:2305.14314 (nf4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.quantized import PIECE_NUMBERS, QuantizedWeight, grouped_by_kind

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES: dict[str, tuple[float, ...]] = {
    "int4": tuple(float(code - 8) for code in range(16)),
    "fp4": FP4 + tuple(-value for value in FP4),
    "nf4": NF4,
}
CODES = (*VALUES, "int8", "e4m3")
E4M3_MAX = 448.0
GROUP_STEP = 8
"""A group has a multiple of this number of inputs, or all inputs of a row."""


@dataclass(frozen=True, slots=True, eq=False)
class CodedWeight:
    """A weight [out, in] of codes.

    codes         one of CODES
    data          uint8: [out, ceil(in / 2)], the even input in the low half; 8 bits: [out, in]
    scales        [out, ceil(in / group_inputs)] fp32
    group_inputs  inputs that share a scale: a multiple of 8, or at least all inputs
    shifts        like scales, whole numbers from -256 to 256; None: 0
    out_scales    [out] fp32; None: 1
    order         [in] int32: the i-th input of the codes is input order[i] of x; None: input i
    rounds_inputs whether the checkpoint was made for activations that are rounded too; kernels may
                  round them where products of two 8-bit numbers are faster, and say so
    Raises        ValueError if shapes or dtypes do not fit each other
    """

    codes: str
    shape: tuple[int, int]
    data: Tensor
    scales: Tensor
    group_inputs: int
    shifts: Tensor | None = None
    out_scales: Tensor | None = None
    order: Tensor | None = None
    rounds_inputs: bool = False

    def __post_init__(self) -> None:
        num_out, num_in = self.shape
        if self.codes not in CODES:
            raise ValueError(f"the codes are {self.codes!r} but must be one of {', '.join(CODES)}")
        if self.group_inputs < num_in and self.group_inputs % GROUP_STEP:
            raise ValueError(
                f"groups of {self.group_inputs} inputs: they must be a multiple of {GROUP_STEP}, "
                f"or all {num_in}"
            )
        per_group = (num_out, -(-num_in // self.group_inputs))
        wanted = {
            "data": (self.data, (num_out, self.row_bytes), torch.uint8),
            "scales": (self.scales, per_group, torch.float32),
            "shifts": (self.shifts, per_group, torch.float32),
            "out_scales": (self.out_scales, (num_out,), torch.float32),
            "order": (self.order, (num_in,), torch.int32),
        }
        for name, (tensor, shape, dtype) in wanted.items():
            if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
                raise ValueError(
                    f"{name} of a {self.codes} weight {list(self.shape)} must be {dtype} "
                    f"{list(shape)}, not {tensor.dtype} {list(tensor.shape)}"
                )

    @property
    def row_bytes(self) -> int:
        """Bytes of one output's codes."""
        return self.shape[1] if self.codes in ("int8", "e4m3") else -(-self.shape[1] // 2)

    @property
    def num_bytes(self) -> int:
        others = (self.scales, self.shifts, self.out_scales, self.order)
        return self.data.numel() + sum(4 * part.numel() for part in others if part is not None)

    def rows(self, first: int, size: int) -> CodedWeight:
        """The weight of the outputs first .. first + size."""
        return self._cut(slice(first, first + size), size)

    def chosen(self, rows: Tensor) -> CodedWeight:
        """The weight of the outputs `rows` [n] int64, in this order."""
        return self._cut(rows, rows.numel())

    def _cut(self, rows: slice | Tensor, size: int) -> CodedWeight:
        return replace(
            self,
            shape=(size, self.shape[1]),
            data=self.data[rows],
            scales=self.scales[rows],
            shifts=None if self.shifts is None else self.shifts[rows],
            out_scales=None if self.out_scales is None else self.out_scales[rows],
        )

    def columns(self, first: int, size: int) -> CodedWeight:
        """The weight of the inputs first .. first + size. If these cut a group, the result has
        smaller groups, which repeat its scale.

        Raises ValueError if these groups would not be multiples of 8 inputs, or if the weight has
        another order of inputs.
        """
        num_in, group = self.shape[1], self.group_inputs
        if (first, size) == (0, num_in):
            return self
        has_one_group = group >= num_in
        if not has_one_group:
            to_end = first + size == num_in
            smaller = math.gcd(group, first) if to_end else math.gcd(group, first, size)
            if smaller < group and smaller % GROUP_STEP == 0 and self.order is None:
                return self._in_groups_of(smaller).columns(first, size)
        step = 2 if has_one_group else group
        if self.order is not None or first % step or (size % step and first + size != num_in):
            raise ValueError(
                f"inputs {first} to {first + size} cannot be cut out of a {self.codes} weight of "
                f"groups of {group} inputs"
                + ("" if self.order is None else ", which are in an order of their own")
            )
        per_byte = self.shape[1] // self.row_bytes
        groups = (
            slice(None) if has_one_group else slice(first // group, -(-(first + size) // group))
        )
        return replace(
            self,
            shape=(self.shape[0], size),
            data=self.data[:, first // per_byte : -(-(first + size) // per_byte)],
            scales=self.scales[:, groups],
            shifts=None if self.shifts is None else self.shifts[:, groups],
        )

    def _in_groups_of(self, group: int) -> CodedWeight:
        """The same weight in smaller groups, of a divisor of the present size."""
        num_groups, times = -(-self.shape[1] // group), self.group_inputs // group

        def repeated(scales: Tensor) -> Tensor:
            return scales.repeat_interleave(times, dim=1)[:, :num_groups].contiguous()

        shifts = None if self.shifts is None else repeated(self.shifts)
        return replace(self, group_inputs=group, scales=repeated(self.scales), shifts=shifts)

    def to(self, device: torch.device) -> CodedWeight:
        return replace(
            self,
            data=self.data.to(device),
            scales=self.scales.to(device),
            shifts=None if self.shifts is None else self.shifts.to(device),
            out_scales=None if self.out_scales is None else self.out_scales.to(device),
            order=None if self.order is None else self.order.to(device),
        )

    def with_rows(self, num_rows: int) -> CodedWeight:
        """The weight with outputs that are zero added at its end, until it has `num_rows`."""
        more = num_rows - self.shape[0]
        if more == 0:
            return self
        below = (0, 0, 0, more)
        return replace(
            self,
            shape=(num_rows, self.shape[1]),
            data=F.pad(self.data, below),
            scales=F.pad(self.scales, below),
            shifts=None if self.shifts is None else F.pad(self.shifts, below),
            out_scales=None if self.out_scales is None else F.pad(self.out_scales, (0, more)),
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
        num_in = self.shape[1]
        w = self.values()
        group = torch.arange(num_in, device=w.device) // self.group_inputs
        if self.shifts is not None:
            w = w + self.shifts[:, group]
        w = w * self.scales[:, group]
        if self.out_scales is not None:
            w = w * self.out_scales[:, None]
        if self.order is None:
            return w
        in_order = torch.empty_like(w)
        in_order[:, self.order.long()] = w
        return in_order

    def values(self) -> Tensor:
        """The values of the codes, [out, in] fp32, in the codes' own order of inputs."""
        if self.codes == "int8":
            return self.data.view(torch.int8).float()
        if self.codes == "e4m3":
            return self.data.view(torch.float8_e4m3fn).float()
        both = torch.stack((self.data & 15, self.data >> 4), dim=-1).flatten(1)
        table = torch.tensor(VALUES[self.codes], device=self.data.device)
        return table[both[:, : self.shape[1]].int()]

    def stacks_with(self, other: CodedWeight) -> bool:
        """Whether both weights have the same layout, so that one weight can hold all outputs."""
        return (
            self.codes == other.codes
            and self.shape[1] == other.shape[1]
            and self.scales.shape[1] == other.scales.shape[1]
            and self.group_inputs == other.group_inputs
            and self.rounds_inputs == other.rounds_inputs
            and (self.shifts is None) == (other.shifts is None)
            and (self.out_scales is None) == (other.out_scales is None)
            and _equal(self.order, other.order)
        )


LinearPart = QuantizedWeight | CodedWeight
"""A weight that is kept quantised: some outputs of a linear layer."""


def _equal(first: Tensor | None, other: Tensor | None) -> bool:
    if first is None or other is None:
        return first is other
    return torch.equal(first, other)


def neighbours_stacked(parts: Sequence[LinearPart]) -> tuple[LinearPart, ...]:
    """The same outputs in the same order, with neighbours of the same layout joined to one."""
    found: list[LinearPart] = []
    for part in parts:
        last = found[-1] if found else None
        match last, part:
            case CodedWeight(), CodedWeight() if last.stacks_with(part):
                found[-1] = _stacked(last, part)
            case QuantizedWeight(), QuantizedWeight():
                found[-1:] = grouped_by_kind([last, part])
            case _:
                found.append(part)
    return tuple(found)


def _stacked(first: CodedWeight, second: CodedWeight) -> CodedWeight:
    def both(first: Tensor | None, other: Tensor | None) -> Tensor | None:
        return None if first is None or other is None else torch.cat((first, other))

    return replace(
        first,
        shape=(first.shape[0] + second.shape[0], first.shape[1]),
        data=torch.cat((first.data, second.data)),
        scales=torch.cat((first.scales, second.scales)),
        shifts=both(first.shifts, second.shifts),
        out_scales=both(first.out_scales, second.out_scales),
    )


def quantize_codes(weight: Tensor, codes: str, group_inputs: int | None = None) -> CodedWeight:
    """weight [out, in] of any float dtype -> "e4m3" or "int8" codes, rounded to the nearest.

    Each group's largest magnitude becomes 448 or 127. group_inputs None: one scale per output.
    Raises ValueError for other codes, or groups that do not divide the inputs."""
    if codes not in ("e4m3", "int8"):
        raise ValueError(f"weights can be quantised to e4m3 and int8 codes, not to {codes}")
    num_out, num_in = weight.shape
    group = num_in if group_inputs is None else group_inputs
    if num_in % group:
        raise ValueError(f"the weight has {num_in} inputs, which groups of {group} do not divide")
    limit = E4M3_MAX if codes == "e4m3" else 127.0
    data = torch.empty(num_out, num_in, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(num_out, num_in // group, device=weight.device)
    step = max(1, PIECE_NUMBERS // max(1, num_in))
    for first in range(0, num_out, step):
        rows = slice(first, first + step)
        x = weight[rows].float().view(-1, num_in // group, group)
        scale = x.abs().amax(-1) / limit
        # NaN or infinity among the weights makes the scale so too, and every result shows it.
        numbers = (x / scale.clamp_min(1e-38).unsqueeze(-1)).nan_to_num_(0.0).clamp_(-limit, limit)
        whole = (
            numbers.to(torch.float8_e4m3fn) if codes == "e4m3" else numbers.round_().to(torch.int8)
        )
        data[rows] = whole.view(torch.uint8).flatten(1)
        scales[rows] = scale
    return CodedWeight(codes, (num_out, num_in), data, scales, group)
