"""GPTQ: 4 or 8 bits in groups, perhaps in the order of activations' sizes (act-order).

Source: Frantar et al. 2022, arXiv:2210.17323; the layout is AutoGPTQ's and GPTQModel's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError, WeightError
from sapwood.kernels.coded import CodedWeight
from sapwood.layers.quantization.formats.interface import (
    LinearTensors,
    group_of,
    in_groups,
    integer,
)
from sapwood.layers.quantization.formats.packing import order_of, packed_nibbles, unpacked

_INDICES = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class GptqFormat:
    """qweight [in * bits / 32, out] and qzeros [groups, out * bits / 32] int32, scales [groups,
    out], g_idx [in]: the group of each input. w = (q - zero) * scale.

    zero_offset  difference between a zero point and the stored number: 1; 0 in gptq_v2
    """

    bits: int
    group: int
    act_order: bool
    zero_offset: int
    name: str = "gptq"

    @property
    def weight_bytes(self) -> float:
        return self.bits / 8 + 0.06

    @property
    def summary(self) -> str:
        order = ", in activation order" if self.act_order else ""
        scales = f"{in_groups(self.group)}{order}"
        return f"GPTQ: {self.bits}-bit weights, {scales}; activations as they are"

    def linear(self, tensors: LinearTensors) -> Tensor | CodedWeight:
        dense = tensors.dense()
        if dense is not None:
            return dense
        num_out, num_in = tensors.shape
        per_word = 32 // self.bits
        group = num_in if self.group == -1 else self.group
        num_groups = -(-num_in // group)
        words = tensors.take("qweight", [(num_in // per_word, num_out)], [torch.int32])
        zeros = tensors.take("qzeros", [(num_groups, num_out // per_word)], [torch.int32])
        scales = tensors.scales("scales", [(num_groups, num_out)])
        middle = 1 << (self.bits - 1)
        shifts = middle - (unpacked(zeros, self.bits).T.float() + self.zero_offset)
        codes = unpacked(words.T, self.bits)
        order = None
        if self.act_order or "g_idx" in tensors:
            index = tensors.take("g_idx", [(num_in,)], _INDICES)
            order = _order(tensors.module, index, group)
            if order is not None:
                codes = codes[:, order.long()]
        kind = "int8" if self.bits == 8 else "int4"
        data = codes ^ 128 if self.bits == 8 else packed_nibbles(codes)
        if not shifts.any():
            return CodedWeight(kind, tensors.shape, data, scales.T.contiguous(), group, order=order)
        return CodedWeight(
            kind, tensors.shape, data, scales.T.contiguous(), group, shifts, order=order
        )


def _order(module: str, index: Tensor, group: int) -> Tensor | None:
    try:
        return order_of(index, group)
    except ValueError as error:
        raise WeightError(
            f"{module}.g_idx does not fit group_size {group}: {error}; config.json and the weights "
            "do not belong together"
        ) from error


def read(config: Mapping[str, Any]) -> GptqFormat:
    stored = str(config.get("checkpoint_format", "gptq")).lower()
    if stored not in ("gptq", "gptq_v2"):
        raise ConfigError(
            f"the checkpoint is GPTQ in checkpoint_format {stored!r}, which is not supported; "
            "use one in 'gptq' or 'gptq_v2'"
        )
    return GptqFormat(
        bits=integer(config, "bits", (4, 8), "GPTQ"),
        group=group_of(config, "GPTQ"),
        act_order=bool(config.get("desc_act", False)),
        zero_offset=1 if stored == "gptq" else 0,
    )
