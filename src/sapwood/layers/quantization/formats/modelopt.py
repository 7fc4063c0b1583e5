"""NVIDIA ModelOpt: FP8 per tensor, and NVFP4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.coded import CodedWeight
from sapwood.layers.quantization.formats.fp4 import NV_GROUP, nvfp4_weight
from sapwood.layers.quantization.formats.fp8 import FP8_ACTIVATIONS, e4m3_weight
from sapwood.layers.quantization.formats.interface import CheckpointFormat, LinearTensors

_ALGORITHMS = ("FP8", "NVFP4")


@dataclass(frozen=True, slots=True)
class ModelOptFormat:
    """weight with weight_scale [] (FP8), or with weight_scale [out, in / 16] and weight_scale_2 []
    (NVFP4)."""

    algorithm: str
    name: str = "modelopt"

    @property
    def weight_bytes(self) -> float:
        return 1.0 if self.algorithm == "FP8" else 0.63

    @property
    def summary(self) -> str:
        what = (
            f"FP8 E4M3 weights, one scale per tensor; {FP8_ACTIVATIONS}"
            if self.algorithm == "FP8"
            else "NVFP4: E2M1 weights, an E4M3 scale per 16 inputs; activations as they are (W4A16)"
        )
        return f"ModelOpt: {what}"

    def linear(self, tensors: LinearTensors) -> Tensor | CodedWeight:
        dense = tensors.dense()
        if dense is not None:
            return dense
        if self.algorithm == "FP8":
            return e4m3_weight(tensors, "weight_scale", None, rounds_inputs=True)
        return nvfp4_weight(tensors, "weight", "weight_scale_2", divides=False)

    def units(self, module: str) -> tuple[int, int]:
        del module
        return (1, 1) if self.algorithm == "FP8" else (1, NV_GROUP)


def read(config: Mapping[str, Any]) -> CheckpointFormat:
    inner = config.get("quantization")
    fields = inner if isinstance(inner, Mapping) else config
    algorithm = str(fields.get("quant_algo", "")).upper()
    if algorithm not in _ALGORITHMS:
        raise ConfigError(
            f"the checkpoint is ModelOpt's with quant_algo {algorithm or None!r}; supported: "
            f"{', '.join(_ALGORITHMS)}. Use another version of the model"
        )
    return ModelOptFormat(algorithm)
