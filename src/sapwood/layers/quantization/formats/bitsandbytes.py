"""bitsandbytes: NF4 in blocks of the flattened weight, and int8 rows.

Sources: Dettmers et al. 2023, arXiv:2305.14314; Dettmers et al. 2022, arXiv:2208.07339.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError, WeightError
from sapwood.kernels.coded import VALUES, CodedWeight
from sapwood.layers.quantization.formats.interface import CheckpointFormat, LinearTensors
from sapwood.layers.quantization.formats.packing import swapped_nibbles

NF4_STATE = "weight.quant_state.bitsandbytes__nf4"


@dataclass(frozen=True, slots=True)
class Nf4Format:
    """NF4 in blocks of the flattened weight.

    weight is [out * in / 2, 1] uint8, with the earlier number in a byte's high half. weight.absmax
    has a scale per block, and a JSON text has the blocks' sizes. With double quantisation absmax is
    uint8: an index into weight.nested_quant_map, times weight.nested_absmax, plus an offset.
    """

    name: str = "bitsandbytes"
    weight_bytes: float = 0.63

    @property
    def summary(self) -> str:
        return "bitsandbytes: NF4 weights in blocks; activations as they are"

    def linear(self, tensors: LinearTensors) -> Tensor | CodedWeight:
        dense = tensors.dense()
        if dense is not None:
            return dense
        num_out, num_in = tensors.shape
        size = num_out * num_in
        state = self._state(tensors)
        block = state["blocksize"]
        codes = tensors.take("weight", [(size // 2, 1), (1, size // 2)], [torch.uint8])
        scales = self._scales(tensors, state, -(-size // block))
        table = tensors.take("weight.quant_map", [(16,)], [torch.float32])
        if not torch.allclose(table, torch.tensor(VALUES["nf4"]), atol=1e-6):
            raise WeightError(
                f"{tensors.module}.weight.quant_map is not NF4's table; use another version of the "
                "model"
            )
        # Blocks go on from row to row, so a block may end in the middle of a row.
        group = num_in if block % num_in == 0 else math.gcd(block, num_in)
        if (group % 8 and group != num_in) or num_in % 2:
            raise WeightError(
                f"{tensors.module}.weight has blocks of {block} numbers in rows of {num_in}, which "
                "no kernel takes; use another version of the model"
            )
        first = torch.arange(0, size, group)
        return CodedWeight(
            "nf4",
            tensors.shape,
            swapped_nibbles(codes.reshape(num_out, num_in // 2)),
            scales[first // block].view(num_out, num_in // group),
            group,
        )

    def units(self, module: str) -> None:
        """Blocks go on from row to row."""
        del module

    @staticmethod
    def _state(tensors: LinearTensors) -> dict[str, Any]:
        raw = tensors.take(NF4_STATE, dtypes=[torch.uint8])
        try:
            state = json.loads(bytes(raw.tolist()).decode("utf-8"))
            sizes = (state["blocksize"], state.get("nested_blocksize", 1))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightError(f"{tensors.module}.{NF4_STATE} cannot be read: {error!r}") from error
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise WeightError(f"{tensors.module}.{NF4_STATE} has blocks of {sizes} numbers")
        if list(state.get("shape", tensors.shape)) != list(tensors.shape):
            raise WeightError(
                f"{tensors.module}.weight is {state['shape']} but must be {list(tensors.shape)}"
            )
        return dict(state)

    @staticmethod
    def _scales(tensors: LinearTensors, state: Mapping[str, Any], num_blocks: int) -> Tensor:
        if "weight.nested_absmax" not in tensors:
            return tensors.scales("weight.absmax", [(num_blocks,)])
        nested_block = state["nested_blocksize"]
        indices = tensors.take("weight.absmax", [(num_blocks,)], [torch.uint8])
        table = tensors.scales("weight.nested_quant_map", [(256,)])
        nested = tensors.scales("weight.nested_absmax", [(-(-num_blocks // nested_block),)])
        of_block = nested[torch.arange(num_blocks) // nested_block]
        return table[indices.int()] * of_block + float(state.get("nested_offset", 0.0))


@dataclass(frozen=True, slots=True)
class Int8RowsFormat:
    """weight [out, in] int8 and SCB [out]: w = weight * SCB / 127."""

    name: str = "bitsandbytes"
    weight_bytes: float = 1.0

    @property
    def summary(self) -> str:
        return (
            "bitsandbytes: int8 weights, one scale per output; activations as they are (W8A16), so "
            "that outliers need no product of their own"
        )

    def linear(self, tensors: LinearTensors) -> Tensor | CodedWeight:
        dense = tensors.dense()
        if dense is not None:
            return dense
        num_out, num_in = tensors.shape
        weight = tensors.take("weight", [tensors.shape], [torch.int8])
        largest = tensors.scales("SCB", [(num_out,)])
        if "weight_format" in tensors:
            layout = tensors.take("weight_format", dtypes=[torch.uint8])
            if layout.any():
                raise WeightError(
                    f"{tensors.module}.weight has weight_format {layout.tolist()}; only 0 (rows) "
                    "is supported: save the model again with a newer bitsandbytes"
                )
        scales = (largest / 127.0).unsqueeze(1)
        return CodedWeight("int8", tensors.shape, weight.view(torch.uint8), scales, num_in)

    def units(self, module: str) -> tuple[int, int]:
        del module
        return 1, 1


def read(config: Mapping[str, Any]) -> CheckpointFormat:
    if config.get("load_in_4bit") or config.get("_load_in_4bit"):
        kind = str(config.get("bnb_4bit_quant_type", "fp4")).lower()
        if kind != "nf4":
            raise ConfigError(
                f"the checkpoint is bitsandbytes' in {kind}; supported: nf4 and int8. Use the "
                "model's unquantised checkpoint with --quantization w4a8"
            )
        return Nf4Format()
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return Int8RowsFormat()
    raise ConfigError(
        "quantization_config names bitsandbytes but neither load_in_4bit nor load_in_8bit"
    )
