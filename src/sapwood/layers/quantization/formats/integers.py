"""Weights of 4-bit and 8-bit integers in groups of inputs, perhaps in an order of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.kernels.coded import CodedWeight
from sapwood.layers.quantization.formats.interface import LinearTensors
from sapwood.layers.quantization.formats.packing import order_of, packed_nibbles

_INDICES = (torch.int32, torch.int64)


def num_groups(tensors: LinearTensors, group: int, index: str) -> int:
    """How many groups of inputs the scales have. `group`: inputs in each; `index`: the name of the
    tensor with the group of each input, with which a part of the inputs has all scales."""
    num_in = (tensors.whole_shape if index in tensors else tensors.shape)[1]
    return -(-num_in // group)


def integer_weight(
    tensors: LinearTensors,
    bits: int,
    codes: Tensor,
    scales: Tensor,
    shifts: Tensor | None,
    group: int,
    index: str | None,
) -> Tensor | CodedWeight:
    """codes [out, in] uint8, scales and shifts [out, groups] fp32: w = (code - middle + shift) *
    scale, where the middle is half the number of codes.

    index  the name of the tensor with the group of each input; None: inputs are in order
    A part of the inputs whose groups are not in order comes dense, in fp32: its groups would have
    different sizes, which no kernel takes.
    Raises WeightError, with the layer's name, for an index that does not fit."""
    order = None
    if index is not None:
        of_input = tensors.take(index, [(tensors.shape[1],)], _INDICES)
        if tensors.part is not None and tensors.part.dim:
            first = tensors.part.first
            own = torch.arange(first, first + tensors.part.size) // group
            if not torch.equal(of_input.long(), own) or (first % group and own[-1] > 0):
                return _dense(tensors, bits, codes, scales, shifts, of_input.long(), index)
            groups = slice(int(own[0]), int(own[-1]) + 1)
            scales = scales[:, groups].contiguous()
            shifts = None if shifts is None else shifts[:, groups].contiguous()
        else:
            order = _order(tensors.module, index, of_input, group)
            codes = codes if order is None else codes[:, order.long()]
    kind = "int8" if bits == 8 else "int4"
    data = codes ^ 128 if bits == 8 else packed_nibbles(codes)
    return CodedWeight(kind, tensors.shape, data, scales, group, shifts, order=order)


def _dense(
    tensors: LinearTensors,
    bits: int,
    codes: Tensor,
    scales: Tensor,
    shifts: Tensor | None,
    of_input: Tensor,
    index: str,
) -> Tensor:
    if of_input.min() < 0 or of_input.max() >= scales.shape[1]:
        raise WeightError(
            f"{tensors.module}.{index} names groups {int(of_input.min())} to "
            f"{int(of_input.max())} but there are {scales.shape[1]}; config.json and the weights "
            "do not belong together"
        )
    values = codes.float() - (1 << (bits - 1))
    if shifts is not None:
        values += shifts[:, of_input]
    return values * scales[:, of_input]


def _order(module: str, name: str, index: Tensor, group: int) -> Tensor | None:
    try:
        return order_of(index, group)
    except ValueError as error:
        raise WeightError(
            f"{module}.{name} does not fit group_size {group}: {error}; config.json and the "
            "weights do not belong together"
        ) from error
