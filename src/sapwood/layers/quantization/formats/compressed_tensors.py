"""compressed-tensors: the format of llm-compressor, with a scheme per group of layers.

Source: the format's configuration and packing as vllm-project/compressed-tensors documents them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError, WeightError
from sapwood.kernels.coded import CodedWeight, LinearPart
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.layers.quantization.formats.fp4 import (
    MX_GROUP,
    NV_GROUP,
    mxfp4_weight,
    nvfp4_weight,
)
from sapwood.layers.quantization.formats.fp8 import FP8_ACTIVATIONS, block_of, e4m3_weight
from sapwood.layers.quantization.formats.integers import integer_weight
from sapwood.layers.quantization.formats.integers import num_groups as groups_of
from sapwood.layers.quantization.formats.interface import LinearTensors, in_groups
from sapwood.layers.quantization.formats.packing import unpacked

_FORMATS = {
    ("int", 4): ("pack-quantized",),
    ("int", 8): ("int-quantized", "naive-quantized", "pack-quantized"),
    ("float", 8): ("float-quantized", "naive-quantized"),
    ("float", 4): ("nvfp4-pack-quantized", "mxfp4-pack-quantized"),
}
_FOUR_BIT_GROUPS = {"nvfp4-pack-quantized": NV_GROUP, "mxfp4-pack-quantized": MX_GROUP}
_WAY_OUT = (
    "use another version of the model, or its unquantised checkpoint with --quantization "
    "w8a8_int8, w4a8, fp8 or w8a16"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """One entry of config_groups: some layers, and how they are stored.

    targets     the layers: names, "re:" and a regular expression, or classes
    form        how the weights are stored: one of _FORMATS
    strategy    the unit that has a scale: "tensor", "channel", "group", "block", "tensor_group"
    group       inputs that share a scale; -1: all
    block       outputs and inputs of a block
    symmetric   whether there are no zero points
    act_order   whether weight_g_idx says which group each input is in
    rounds_activations  whether the checkpoint was made for rounded activations
    """

    targets: tuple[str, ...]
    form: str
    kind: str
    bits: int
    strategy: str
    group: int
    block: tuple[int, int] | None
    symmetric: bool
    act_order: bool
    rounds_activations: bool

    @property
    def is_int8_product(self) -> bool:
        """Whether weights and activations are int8, with one scale per output."""
        return (
            (self.kind, self.bits) == ("int", 8)
            and self.form != "pack-quantized"
            and self.rounds_activations
            and self.symmetric
            and self.strategy in ("tensor", "channel")
        )

    @property
    def float_block(self) -> tuple[int, int] | None:
        """Outputs and inputs that share a scale, of FP8 weights; None: as in `strategy`."""
        return (1, self.group) if self.strategy == "group" else self.block

    @property
    def units(self) -> tuple[int, int]:
        """As in CheckpointFormat."""
        if self.form in _FOUR_BIT_GROUPS:
            return 1, _FOUR_BIT_GROUPS[self.form]
        if self.kind == "float":
            return self.float_block or (1, 1)
        per_word = 32 // self.bits if self.form == "pack-quantized" else 1
        # Inputs in an order of their own are in any groups.
        in_any_group = self.group == -1 or self.act_order
        return per_word, per_word if in_any_group else math.lcm(per_word, self.group)

    @property
    def summary(self) -> str:
        kind = {"int": "int", "float": "FP"}[self.kind] + str(self.bits)
        if self.form.startswith(("nvfp4", "mxfp4")):
            kind = self.form[:5].upper()
        scales = {
            "tensor": "one scale per tensor",
            "channel": "one scale per output",
            "block": f"a scale per block of {self.block}",
        }.get(self.strategy, in_groups(self.group))
        if self.is_int8_product:
            activations = "int8 activations, a scale per token and 64 inputs"
        elif self.rounds_activations and self.kind == "float" and self.bits == 8:
            activations = FP8_ACTIVATIONS
        elif self.rounds_activations:
            activations = f"activations as they are (W{self.bits}A16), not rounded"
        else:
            activations = "activations as they are"
        return f"{kind} weights, {scales}; {activations}"


@dataclass(frozen=True, slots=True)
class CompressedTensorsFormat:
    groups: tuple[LayerGroup, ...]
    ignored: tuple[str, ...]
    name: str = "compressed-tensors"

    @property
    def weight_bytes(self) -> float:
        return max(group.bits / 8 + (0.06 if group.bits == 4 else 0.0) for group in self.groups)

    @property
    def summary(self) -> str:
        kinds = list(dict.fromkeys(group.summary for group in self.groups))
        return f"compressed-tensors: {'; and '.join(kinds)}"

    def group_of(self, module: str) -> LayerGroup | None:
        """The group of a layer; None: the layer is not quantised.

        A target that is the layer's name counts more than a regular expression, and that more than
        a class.
        """
        if any(_fit(module, target) for target in self.ignored):
            return None
        found = [
            (fit, -place, group)
            for place, group in enumerate(self.groups)
            for target in group.targets
            if (fit := _fit(module, target))
        ]
        return max(found, key=lambda match: match[:2])[2] if found else None

    def linear(self, tensors: LinearTensors) -> Tensor | LinearPart:
        group = self.group_of(tensors.module)
        if group is None:
            return tensors.take("weight", [tensors.shape])
        # Tools pass over experts that are no layers of their own, and routers; not all say so.
        dense = tensors.dense()
        if dense is not None:
            return dense
        if group.form == "nvfp4-pack-quantized":
            return nvfp4_weight(tensors, "weight_packed", "weight_global_scale", divides=True)
        if group.form == "mxfp4-pack-quantized":
            num_out, num_in = tensors.shape
            codes = tensors.take("weight_packed", [(num_out, num_in // 2)], [torch.uint8])
            return mxfp4_weight(tensors, codes, "weight_scale")
        if group.kind == "float":
            return e4m3_weight(
                tensors, "weight_scale", group.float_block, rounds_inputs=group.rounds_activations
            )
        return _integers(tensors, group)

    def units(self, module: str) -> tuple[int, int]:
        group = self.group_of(module)
        return (1, 1) if group is None else group.units


def _integers(tensors: LinearTensors, group: LayerGroup) -> Tensor | LinearPart:
    num_out, num_in = tensors.shape
    size = tensors.whole_shape[1] if group.group == -1 else group.group
    index = "weight_g_idx" if group.act_order else None
    num_groups = -(-num_in // size) if index is None else groups_of(tensors, size, index)
    shapes: list[tuple[int, ...]] = [(num_out, num_groups)]
    if group.strategy in ("tensor", "channel"):
        shapes += [(), (1,), (1, 1), (num_out,)]
    scales = tensors.scales("weight_scale", shapes).reshape(-1, num_groups)
    scales = scales.expand(num_out, num_groups).contiguous()
    shifts = _shifts(tensors, group, num_groups)
    if group.form != "pack-quantized":
        numbers = tensors.take("weight", [tensors.shape], [torch.int8])
        if group.is_int8_product and shifts is None:
            return QuantizedWeight("int8", tensors.shape, numbers, scales[:, 0].contiguous())
        return CodedWeight("int8", tensors.shape, numbers.view(torch.uint8), scales, size, shifts)
    words = -(-num_in * group.bits // 32)
    packed = tensors.take("weight_packed", [(num_out, words)], [torch.int32])
    if "weight_shape" in tensors:
        stated = tensors.take("weight_shape", [(2,)]).tolist()
        if stated != list(tensors.whole_shape):
            raise WeightError(
                f"{tensors.module}.weight_shape is {stated} but the layer has "
                f"{list(tensors.whole_shape)}"
            )
    codes = unpacked(packed, group.bits)[:, :num_in]
    return integer_weight(tensors, group.bits, codes, scales, shifts, size, index)


def _shifts(tensors: LinearTensors, group: LayerGroup, num_groups: int) -> Tensor | None:
    """The zero points with the opposite sign; None if all are 0."""
    if group.symmetric and "weight_zero_point" not in tensors:
        return None
    num_out = tensors.shape[0]
    if group.form == "pack-quantized":
        # Packed along the outputs, unsigned.
        words = -(-num_out * group.bits // 32)
        zeros = tensors.take("weight_zero_point")
        if zeros.dtype == torch.int32:
            zeros = tensors.take("weight_zero_point", [(words, num_groups)], [torch.int32])
            unsigned = unpacked(zeros.T, group.bits)[:, :num_out].T
            shifts = (1 << (group.bits - 1)) - unsigned.float()
            return shifts.contiguous() if shifts.any() else None
    shapes = [(num_out, num_groups), (num_out,), (1,), (), (1, 1)]
    zeros = tensors.take("weight_zero_point", shapes, [torch.int8])
    shifts = -zeros.float().reshape(-1, 1 if zeros.numel() == 1 else num_groups)
    return shifts.expand(num_out, num_groups).contiguous() if shifts.any() else None


def _fit(module: str, target: str) -> int:
    """How closely a target names a layer: 3 by its name, 2 by a pattern, 1 by its class, 0 not."""
    if target == module:
        return 3
    if target.startswith("re:"):
        return 2 if re.match(target.removeprefix("re:"), module) else 0
    return 1 if target == ("Embedding" if module.endswith("embed_tokens") else "Linear") else 0


def read(config: Mapping[str, Any]) -> CompressedTensorsFormat:
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") not in ("dense", None):
        raise ConfigError(
            f"the checkpoint's weights are stored sparsely ({sparsity['format']}), which is not "
            f"supported; {_WAY_OUT}"
        )
    transforms = (config.get("transform_config") or {}).get("config_groups")
    if transforms:
        raise ConfigError(
            f"the checkpoint needs transforms of activations ({', '.join(transforms)}), which are "
            f"not supported; {_WAY_OUT}"
        )
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError(
            "quantization_config of a compressed-tensors checkpoint has no config_groups"
        )
    ignored = tuple(map(str, config.get("ignore") or ()))
    found = tuple(_group(name, group, config.get("format")) for name, group in groups.items())
    _check_patterns([*ignored, *(target for group in found for target in group.targets)])
    return CompressedTensorsFormat(found, ignored)


def _check_patterns(targets: Sequence[str]) -> None:
    for target in targets:
        if target.startswith("re:"):
            try:
                re.compile(target.removeprefix("re:"))
            except re.error as error:
                raise ConfigError(
                    f"quantization_config names layers by {target!r}, which is no regular "
                    f"expression: {error}"
                ) from error


def _group(name: str, group: Mapping[str, Any], whole_format: object) -> LayerGroup:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise ConfigError(
            f"config_groups.{name} of quantization_config has no weights to quantise; {_WAY_OUT}"
        )
    kind, bits = str(weights.get("type", "int")), int(weights.get("num_bits", 8))
    known = _FORMATS.get((kind, bits))
    form = group.get("format") or whole_format
    if known is None or form not in known:
        every = "; ".join(f"{k} {b}: {', '.join(forms)}" for (k, b), forms in _FORMATS.items())
        raise ConfigError(
            f"config_groups.{name} stores {bits}-bit {kind} weights in format {form!r}, which is "
            f"not supported (supported: {every}); {_WAY_OUT}"
        )
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "group")
    if strategy == "group" and size == -1:
        strategy = "channel"
    in_group = strategy in ("group", "tensor_group")
    if strategy not in ("tensor", "channel", "block", "group", "tensor_group") or (
        in_group and (not isinstance(size, int) or size < 8 or size % 8)
    ):
        raise ConfigError(
            f"config_groups.{name} has weights of strategy {strategy!r} and group_size {size!r}, "
            f"which is not supported; {_WAY_OUT}"
        )
    if kind == "int" and strategy == "block":
        raise ConfigError(f"config_groups.{name} has int{bits} weights in blocks, which is not "
                          f"supported; {_WAY_OUT}")  # fmt: skip
    return LayerGroup(
        targets=tuple(map(str, group.get("targets") or ())),
        form=str(form),
        kind=kind,
        bits=bits,
        strategy=str(strategy),
        group=int(size) if in_group and size is not None else -1,
        block=block_of(weights.get("block_structure")) if strategy == "block" else None,
        symmetric=bool(weights.get("symmetric", True)),
        act_order=weights.get("actorder") in ("group", "dynamic"),
        rounds_activations=bool(group.get("input_activations")),
    )
