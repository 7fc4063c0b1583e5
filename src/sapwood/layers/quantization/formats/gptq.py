"""GPTQ: 4 or 8 bits in groups, perhaps in the order of activations' sizes (act-order).

Source: Frantar et al. 2022, arXiv:2210.17323; the layout is AutoGPTQ's and GPTQModel's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.coded import CodedWeight
from sapwood.layers.quantization.formats.integers import integer_weight, num_groups
from sapwood.layers.quantization.formats.interface import (
    LinearTensors,
    group_of,
    in_groups,
    integer,
)
from sapwood.layers.quantization.formats.packing import unpacked


@dataclass(frozen=True, slots=True)
class GptqFormat:
    """qweight [in * bits / 32, out] and qzeros [groups, out * bits / 32] int32, scales [groups,
    out], g_idx [in]: the group of each input. w = (q - zero) * scale.

    zero_offset  difference between a zero point and the stored number: 1; 0 in gptq_v2
    exceptions   patterns of layers' names, and the format of these layers; None: they are dense.
                 The first that matches the beginning of a name counts
    """

    bits: int
    group: int
    act_order: bool
    zero_offset: int
    exceptions: tuple[tuple[re.Pattern[str], GptqFormat | None], ...] = ()
    name: str = "gptq"

    @property
    def weight_bytes(self) -> float:
        others = [form.bits for _, form in self.exceptions if form is not None]
        return max(self.bits, *others, 0) / 8 + 0.06

    @property
    def summary(self) -> str:
        order = ", in activation order" if self.act_order else ""
        scales = f"{in_groups(self.group)}{order}"
        others = f", with {len(self.exceptions)} rules for some layers" if self.exceptions else ""
        return f"GPTQ: {self.bits}-bit weights, {scales}{others}; activations as they are"

    def linear(self, tensors: LinearTensors) -> Tensor | CodedWeight:
        for pattern, form in self.exceptions:
            if pattern.match(tensors.module):
                return (
                    tensors.take("weight", [tensors.shape])
                    if form is None
                    else form.linear(tensors)
                )
        dense = tensors.dense()
        if dense is not None:
            return dense
        num_out, num_in = tensors.shape
        per_word = 32 // self.bits
        group = tensors.whole_shape[1] if self.group == -1 else self.group
        groups = num_groups(tensors, group, "g_idx")
        words = tensors.take("qweight", [(num_in // per_word, num_out)], [torch.int32])
        zeros = tensors.take("qzeros", [(groups, num_out // per_word)], [torch.int32])
        scales = tensors.scales("scales", [(groups, num_out)]).T.contiguous()
        middle = 1 << (self.bits - 1)
        shifts = middle - (unpacked(zeros, self.bits).T.float() + self.zero_offset)
        codes = unpacked(words.T, self.bits)
        index = "g_idx" if self.act_order or "g_idx" in tensors else None
        own_shifts = shifts if shifts.any() else None
        return integer_weight(tensors, self.bits, codes, scales, own_shifts, group, index)

    def units(self, module: str) -> tuple[int, int]:
        for pattern, form in self.exceptions:
            if pattern.match(module):
                return (1, 1) if form is None else form.units(module)
        per_word = 32 // self.bits
        # Inputs in an order of their own are in any groups.
        in_any_group = self.group == -1 or self.act_order
        return per_word, per_word if in_any_group else math.lcm(per_word, self.group)


def read(config: Mapping[str, Any]) -> GptqFormat:
    stored = str(config.get("checkpoint_format", "gptq")).lower()
    if stored not in ("gptq", "gptq_v2"):
        raise ConfigError(
            f"the checkpoint is GPTQ in checkpoint_format {stored!r}, which is not supported; "
            "use one in 'gptq' or 'gptq_v2'"
        )
    zero_offset = 1 if stored == "gptq" else 0
    exceptions = tuple(
        _exception(rule, config, fields, zero_offset)
        for rule, fields in (config.get("dynamic") or {}).items()
    )
    return _plain(config, zero_offset, exceptions)


def _plain(
    config: Mapping[str, Any],
    zero_offset: int,
    exceptions: tuple[tuple[re.Pattern[str], GptqFormat | None], ...] = (),
) -> GptqFormat:
    return GptqFormat(
        bits=integer(config, "bits", (4, 8), "GPTQ"),
        group=group_of(config, "GPTQ"),
        act_order=bool(config.get("desc_act", False)),
        zero_offset=zero_offset,
        exceptions=exceptions,
    )


def _exception(
    rule: str, config: Mapping[str, Any], fields: object, zero_offset: int
) -> tuple[re.Pattern[str], GptqFormat | None]:
    """A rule of `dynamic`: "-:" before a pattern leaves layers as they are, "+:" or nothing gives
    them other fields than the rest has. Raises ConfigError if it cannot be read."""
    sign = rule[:2] if rule[:2] in ("+:", "-:") else ""
    try:
        pattern = re.compile(rule.removeprefix(sign))
    except re.error as error:
        raise ConfigError(
            f"quantization_config has a rule {rule!r} in dynamic, which is no regular expression: "
            f"{error}"
        ) from error
    if sign == "-:":
        return pattern, None
    if not isinstance(fields, Mapping):
        raise ConfigError(
            f"quantization_config has {fields!r} for {rule!r} in dynamic but must have an object"
        )
    return pattern, _plain({**config, **fields}, zero_offset)
