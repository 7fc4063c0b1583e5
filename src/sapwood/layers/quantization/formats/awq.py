"""AWQ: 4-bit weights with zero points in groups. Source: Lin et al. 2023, arXiv:2306.00978."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.coded import CodedWeight
from sapwood.layers.quantization.formats.interface import (
    LinearTensors,
    group_of,
    in_groups,
    integer,
)
from sapwood.layers.quantization.formats.packing import packed_nibbles, unpacked

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""For each of eight neighbouring outputs: the nibble of a word that holds it."""


@dataclass(frozen=True, slots=True)
class AwqFormat:
    """qweight [in, out / 8] and qzeros [groups, out / 8] int32, scales [groups, out]; a word has
    eight outputs, interleaved. w = (q - zero) * scale."""

    group: int
    has_zeros: bool
    name: str = "awq"
    weight_bytes: float = 0.56

    @property
    def summary(self) -> str:
        zeros = " with zero points" if self.has_zeros else ""
        return f"AWQ: 4-bit weights{zeros}, {in_groups(self.group)}; activations as they are"

    def linear(self, tensors: LinearTensors) -> Tensor | CodedWeight:
        dense = tensors.dense()
        if dense is not None:
            return dense
        num_out, num_in = tensors.shape
        group = tensors.whole_shape[1] if self.group == -1 else self.group
        num_groups = -(-num_in // group)
        words = tensors.take("qweight", [(num_in, num_out // 8)], [torch.int32])
        scales = tensors.scales("scales", [(num_groups, num_out)]).T.contiguous()
        shifts = None
        if self.has_zeros or "qzeros" in tensors:
            zeros = tensors.take("qzeros", [(num_groups, num_out // 8)], [torch.int32])
            shifts = 8.0 - _in_order(zeros).T.float()
        codes = packed_nibbles(_in_order(words).T)
        return CodedWeight("int4", tensors.shape, codes, scales, group, shifts)

    def units(self, module: str) -> tuple[int, int]:
        del module
        return 8, 1 if self.group == -1 else self.group


def _in_order(words: Tensor) -> Tensor:
    """[rows, out / 8] int32 -> [rows, out] uint8."""
    rows, num_words = words.shape
    return unpacked(words, 4).view(rows, num_words, 8)[:, :, list(PLACES)].flatten(1)


def read(config: Mapping[str, Any]) -> AwqFormat:
    integer(config, "bits" if "bits" in config else "w_bit", (4,), "AWQ")
    version = str(config.get("version", "gemm")).lower()
    if version not in ("gemm", "exllama", "ipex"):
        raise ConfigError(
            f"the checkpoint is AWQ of version {version!r}, whose packing is not supported; "
            "use a checkpoint of version 'gemm'"
        )
    sizes = {**config, "group_size": config.get("group_size", config.get("q_group_size", 128))}
    return AwqFormat(group_of(sizes, "AWQ"), bool(config.get("zero_point", True)))
