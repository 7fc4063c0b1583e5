"""Weights that are quantised while a checkpoint of plain floating-point numbers is loaded.

A part is quantised when it is placed, so that the model is never held in its own dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.blocks import BLOCK_INPUTS
from sapwood.kernels.coded import LinearPart, quantize_codes
from sapwood.kernels.interface import Kernels
from sapwood.kernels.packed import PackedLinear

LOGITS_KIND = "q8_0"
"""The kind of output layers, as in GGUF files: no later layer evens out their errors.

SmolLM2's perplexity would rise by 4% with q4_1 instead, and by 0.4% with int8.
"""

CODED_KINDS = {"fp8": "e4m3", "w8a16": "int8"}
"""Kinds that are stored as codes (kernels/coded.py), a scale per output; others are blocks."""
LOGITS_GROUP = 32
"""Inputs per scale of an output layer in int8 codes: as many as a LOGITS_KIND block has."""


class QuantizingStorage:
    """Quantises each part when it is placed."""

    takes_blocks = False

    def __init__(
        self,
        kind: str,
        num_parts: int,
        *,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
        group_inputs: int | None = None,
    ) -> None:
        """The storage of a weight of the given kind.

        group_inputs  for codes: inputs that share a scale; None: all inputs of an output
        """
        self._kind = kind
        self._group_inputs = group_inputs
        self._kernels = kernels
        self._device = device
        self._dtype = dtype
        self._parts: list[LinearPart | None] = [None] * num_parts

    @property
    def weight(self) -> Tensor:
        raise RuntimeError(f"this layer's weight is kept as {self._kind} numbers only")

    def place(self, part: int, shard: Tensor) -> None:
        weight = shard.to(self._device)
        if self._kind in CODED_KINDS:
            codes = CODED_KINDS[self._kind]
            self._parts[part] = quantize_codes(weight, codes, self._group_inputs)
        else:
            self._parts[part] = self._kernels.quantize_weight(weight, self._kind)

    def place_blocks(self, part: int, shard: LinearPart) -> None:
        self.place(part, shard.dequantized(self._dtype))

    def share(self, weight: Tensor, blocks: LinearPart | None) -> None:
        self.place(0, weight)

    def pack(self, bias: Tensor | None) -> PackedLinear:
        parts = [part for part in self._parts if part is not None]
        if len(parts) != len(self._parts):
            raise RuntimeError("a part of this layer has not been placed")
        self._parts = [None] * len(parts)  # targets may still refer to this storage
        return self._kernels.pack_quantized_linear(parts, bias, self._dtype)

    def repack(self, packed: PackedLinear, bias: Tensor | None) -> PackedLinear:
        return self.pack(bias)


class Int8Scheme:
    """w8a8_int8: int8 weights, one scale per output; int8 activations, one scale per token and 64
    inputs. The output layer is LOGITS_KIND."""

    name = "w8a8_int8"

    def storage(
        self,
        in_size: int,
        part_sizes: tuple[int, ...],
        *,
        makes_logits: bool,
        tied: bool,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
    ) -> QuantizingStorage:
        has_blocks = in_size % BLOCK_INPUTS == 0
        kind = LOGITS_KIND if makes_logits and has_blocks else "int8"
        return QuantizingStorage(kind, len(part_sizes), kernels=kernels, device=device, dtype=dtype)


class Int4Scheme:
    """w4a8: 4-bit weights, an fp16 scale and minimum per 32 inputs (GGUF's Q4_1 blocks); int8
    activations, one scale per token and 32 inputs. The output layer is LOGITS_KIND."""

    name = "w4a8"

    def storage(
        self,
        in_size: int,
        part_sizes: tuple[int, ...],
        *,
        makes_logits: bool,
        tied: bool,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
    ) -> QuantizingStorage:
        if in_size % BLOCK_INPUTS:
            raise ConfigError(
                f"--quantization w4a8 takes blocks of {BLOCK_INPUTS} inputs, but a linear layer of "
                f"this model has {in_size} on each rank; use --quantization w8a8_int8"
            )
        kind = LOGITS_KIND if makes_logits else "q4_1"
        return QuantizingStorage(kind, len(part_sizes), kernels=kernels, device=device, dtype=dtype)


class CodesScheme:
    """8-bit weights, one scale per output, and activations as they are. The output layer is int8
    with a scale per LOGITS_GROUP inputs."""

    def __init__(self, name: str) -> None:
        self.name = name

    def storage(
        self,
        in_size: int,
        part_sizes: tuple[int, ...],
        *,
        makes_logits: bool,
        tied: bool,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
    ) -> QuantizingStorage:
        in_groups = makes_logits and in_size % LOGITS_GROUP == 0
        return QuantizingStorage(
            "w8a16" if makes_logits else self.name,
            len(part_sizes),
            kernels=kernels,
            device=device,
            dtype=dtype,
            group_inputs=LOGITS_GROUP if in_groups else None,
        )


def fp8_scheme() -> CodesScheme:
    """fp8: E4M3 weights, whose error is in proportion to each weight."""
    return CodesScheme("fp8")


def w8a16_scheme() -> CodesScheme:
    """w8a16: int8 weights."""
    return CodesScheme("w8a16")
