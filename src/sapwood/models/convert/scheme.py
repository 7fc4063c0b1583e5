"""What the weights of a converted checkpoint are, and how its config.json says so.

The config is compressed-tensors': a group of layers (all Linear but the ignored ones), how their
weights are stored, and how their inputs are to be rounded. No torch.
Source: https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sapwood.models.convert.options import ConvertOptions

GROUP_SIZES = (128, 64, 32)
"""Tried in this order where none is asked for."""
BLOCK = 128
"""Rows and columns that share a scale in fp8_block, and inputs that do in its activations."""
PACKED_BITS = 32
E4M3_MAX, E2M1_MAX = 448.0, 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightScheme:
    """How a weight [out, in] is stored.

    num_bits    of one weight
    is_float    E4M3, or in 4 bits E2M1, instead of whole numbers
    strategy    "channel": a scale per output; "group": per output and group_size inputs, of E2M1 a
                power of two; "tensor_group": the same in E4M3, and a scale of the whole tensor;
                "block": per BLOCK x BLOCK weights
    group_size  inputs per scale, None: all
    symmetric   no zero points
    rounds_activations  layers are to round their inputs too: per token, or per token and BLOCK
                inputs with "block"
    """

    num_bits: int
    is_float: bool = False
    strategy: str = "channel"
    group_size: int | None = None
    symmetric: bool = True
    rounds_activations: bool = True

    @property
    def format(self) -> str:
        """compressed-tensors' name of the layout on disk."""
        if self.is_e2m1:
            return f"{'nv' if self.strategy == 'tensor_group' else 'mx'}fp4-pack-quantized"
        if self.is_float:
            return "float-quantized"
        return "int-quantized" if self.rounds_activations else "pack-quantized"

    @property
    def is_e2m1(self) -> bool:
        return self.is_float and self.num_bits == 4

    @property
    def lowest(self) -> float:
        return -self.highest if self.is_float else -float(2 ** (self.num_bits - 1))

    @property
    def highest(self) -> float:
        if self.is_float:
            return E2M1_MAX if self.is_e2m1 else E4M3_MAX
        return float(2 ** (self.num_bits - 1) - 1)

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        num_rows, num_columns = shape
        if self.strategy == "block":
            return -(-num_rows // BLOCK), -(-num_columns // BLOCK)
        return num_rows, -(-num_columns // (self.group_size or num_columns))

    def num_bytes(self, shape: tuple[int, int], scale_bytes: int) -> int:
        """On disk, of a weight of that shape; scale_bytes: of a scale that is no FP4's."""
        weights = -(-shape[1] * self.num_bits // PACKED_BITS) * (PACKED_BITS // 8) * shape[0]
        scales = math.prod(self.scale_shape(shape))
        zeros = 0 if self.symmetric else scales * self.num_bits // 8
        if self.is_e2m1:
            return weights + scales + (4 if self.strategy == "tensor_group" else 0)
        noted_shape = 16 if self.format == "pack-quantized" else 0
        return weights + scales * scale_bytes + zeros + noted_shape

    def why_not(self, shape: tuple[int, int]) -> str | None:
        """Why a weight of that shape cannot be stored so."""
        num_rows, num_columns = shape
        if self.group_size is not None and self.strategy != "block":
            if num_columns % self.group_size:
                return f"its {num_columns} inputs are no multiple of the group's {self.group_size}"
            per_word = PACKED_BITS // self.num_bits
            if num_columns % per_word:
                return f"its {num_columns} inputs are no multiple of {per_word}, which one word has"
            if not self.symmetric and num_rows % per_word:
                return f"its {num_rows} outputs are no multiple of {per_word} zero points of a word"
        if self.strategy == "block" and (num_rows % BLOCK or num_columns % BLOCK):
            return f"its sizes {num_rows} x {num_columns} are no multiples of {BLOCK}"
        return None


NVFP4 = WeightScheme(
    num_bits=4,
    is_float=True,
    strategy="tensor_group",
    group_size=16,
    rounds_activations=False,
)
MXFP4 = WeightScheme(
    num_bits=4, is_float=True, strategy="group", group_size=32, rounds_activations=False
)


def choose_scheme(options: ConvertOptions, in_sizes: Sequence[int]) -> WeightScheme:
    """in_sizes: inputs of all layers that are to be converted."""
    match options.scheme:
        case "int8":
            return WeightScheme(num_bits=8)
        case "fp8":
            return WeightScheme(num_bits=8, is_float=True)
        case "fp8_block":
            return WeightScheme(num_bits=8, is_float=True, strategy="block", group_size=BLOCK)
        case "nvfp4":
            return NVFP4
        case "mxfp4":
            return MXFP4
        case _:
            fitting = (size for size in GROUP_SIZES if not any(n % size for n in in_sizes))
            return WeightScheme(
                num_bits=4,
                strategy="group",
                group_size=options.group_size or next(fitting, GROUP_SIZES[-1]),
                symmetric=not options.asymmetric,
                rounds_activations=False,
            )


def quantization_config(
    scheme: WeightScheme, ignore: Sequence[str], *, act_order: bool
) -> dict[str, Any]:
    """What config.json says under "quantization_config".

    ignore     names of linear layers that are stored as they were
    act_order  whether gptq went by the size of activations; scales do not move, so it is a remark
    """
    weights: dict[str, Any] = {
        "num_bits": scheme.num_bits,
        "type": "float" if scheme.is_float else "int",
        "symmetric": scheme.symmetric,
        "strategy": scheme.strategy,
        "dynamic": False,
    }
    if scheme.strategy in ("group", "tensor_group"):
        weights["group_size"] = scheme.group_size
    if scheme.strategy == "block":
        weights["block_structure"] = [BLOCK, BLOCK]
    if scheme.is_e2m1:
        scales = "float8_e4m3fn" if scheme.strategy == "tensor_group" else "uint8"
        weights |= {"scale_dtype": f"torch.{scales}", "zp_dtype": f"torch.{scales}"}
    if act_order:
        weights["actorder"] = "weight"
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": _activations(scheme),
                "output_activations": None,
                "format": scheme.format,
            }
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def _activations(scheme: WeightScheme) -> dict[str, Any] | None:
    if not scheme.rounds_activations:
        return None
    found: dict[str, Any] = {
        "num_bits": 8,
        "type": "float" if scheme.is_float else "int",
        "symmetric": True,
        "strategy": "group" if scheme.strategy == "block" else "token",
        "dynamic": True,
    }
    if scheme.strategy == "block":
        found["group_size"] = BLOCK
    return found
