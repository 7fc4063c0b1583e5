"""quant_method mxfp4, as gpt-oss has it: <name>_blocks and <name>_scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood.kernels.coded import CodedWeight
from sapwood.layers.quantization.formats.fp4 import MX_GROUP, mxfp4_weight
from sapwood.layers.quantization.formats.interface import LinearTensors


@dataclass(frozen=True, slots=True)
class Mxfp4Format:
    """weight_blocks [out, in / 32, 16] uint8 and weight_scales [out, in / 32] uint8."""

    name: str = "mxfp4"
    weight_bytes: float = 0.57

    @property
    def summary(self) -> str:
        return "MXFP4: E2M1 weights, a power of two per 32 inputs; activations as they are"

    def linear(self, tensors: LinearTensors) -> Tensor | CodedWeight:
        dense = tensors.dense()
        if dense is not None:
            return dense
        num_out, num_in = tensors.shape
        blocks = tensors.take(
            "weight_blocks", [(num_out, num_in // MX_GROUP, MX_GROUP // 2)], [torch.uint8]
        )
        return mxfp4_weight(tensors, blocks.flatten(1), "weight_scales")

    def units(self, module: str) -> None:
        """The tensors are of all experts, and cut when they are split."""
        del module


def read(config: Mapping[str, Any]) -> Mxfp4Format:
    return Mxfp4Format()
