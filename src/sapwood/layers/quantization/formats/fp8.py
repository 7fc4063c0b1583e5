"""FP8 E4M3 weights with scales per tensor, per output or per block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.coded import CodedWeight
from sapwood.layers.quantization.formats.interface import LinearTensors

FP8_ACTIVATIONS = "activations as they are (W8A16), or in FP8 on a GPU that multiplies it"


def e4m3_weight(
    tensors: LinearTensors,
    scale_name: str,
    block: tuple[int, int] | None,
    *,
    rounds_inputs: bool,
) -> CodedWeight:
    """weight [out, in] E4M3 times scales: [] or [1], [out] or [out, 1], or one per `block` of
    outputs and inputs. rounds_inputs: whether activations were meant to be FP8."""
    num_out, num_in = tensors.shape
    weight = tensors.take("weight", [tensors.shape], [torch.float8_e4m3fn])
    codes = weight.view(torch.uint8)
    if block is None:
        shapes = [(), (1,), (num_out,), (num_out, 1), (1, 1)]
        scales = tensors.scales(scale_name, shapes).reshape(-1, 1).expand(num_out, 1).contiguous()
        return CodedWeight(
            "e4m3", tensors.shape, codes, scales, num_in, rounds_inputs=rounds_inputs
        )
    rows, columns = block
    blocks = tensors.scales(scale_name, [(-(-num_out // rows), -(-num_in // columns))])
    scales = blocks.repeat_interleave(rows, dim=0)[:num_out].contiguous()
    return CodedWeight("e4m3", tensors.shape, codes, scales, columns, rounds_inputs=rounds_inputs)


def block_of(sizes: Any) -> tuple[int, int]:
    """Outputs and inputs of a block; ConfigError if they cannot be."""
    if (
        not isinstance(sizes, list | tuple)
        or len(sizes) != 2
        or not all(isinstance(size, int) and size > 0 for size in sizes)
        or sizes[1] % 8
    ):
        raise ConfigError(
            f"quantization_config has weight blocks of {sizes!r}; supported: [outputs, inputs], "
            "the inputs a multiple of 8, such as [128, 128]"
        )
    return sizes[0], sizes[1]


@dataclass(frozen=True, slots=True)
class Fp8Format:
    """quant_method fp8 and fbgemm_fp8: weight, and weight_scale (vLLM's and FBGEMM's) or
    weight_scale_inv (DeepSeek's; despite its name it multiplies)."""

    block: tuple[int, int] | None
    name: str = "fp8"
    weight_bytes: float = 1.01

    @property
    def summary(self) -> str:
        what = "per tensor or output"
        if self.block is not None:
            what = f"per block of {self.block[0]} x {self.block[1]}"
        return f"FP8 E4M3 weights, scales {what}; {FP8_ACTIVATIONS}"

    def linear(self, tensors: LinearTensors) -> Tensor | CodedWeight:
        dense = tensors.dense()
        if dense is not None:
            return dense
        name = "weight_scale_inv" if "weight_scale_inv" in tensors else "weight_scale"
        return e4m3_weight(tensors, name, self.block, rounds_inputs=True)

    def units(self, module: str) -> tuple[int, int]:
        del module
        return self.block or (1, 1)


def read(config: Mapping[str, Any]) -> Fp8Format:
    kind = str(config.get("fmt", "e4m3")).lower()
    if kind not in ("e4m3", "float8_e4m3fn"):
        raise ConfigError(
            f"the checkpoint's FP8 weights are {kind}; only E4M3 is supported: use another "
            "version of the model"
        )
    sizes = config.get("weight_block_size")
    return Fp8Format(None if sizes is None else block_of(sizes))
