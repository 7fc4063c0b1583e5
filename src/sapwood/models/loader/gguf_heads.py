"""Value heads of gated delta nets, which some GGUF files have in another order than ours.

Each key head has several value heads. Ours lie together, key head by key head; llama.cpp's order is
the first of each key head, then the second of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import WeightError

_BEHIND_KEYS = ("attn_qkv", "ssm_conv1d")
_ROWS = ("attn_gate", "ssm_a", "ssm_alpha", "ssm_beta", "ssm_dt")
_COLUMNS = ("ssm_out",)
"""Tensors that have rows of value heads after those of queries and keys; only such; columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledHeads:
    """Where a tensor has value heads in llama.cpp's order.

    dim    0: in its rows; 1: in its columns
    first  rows that come before them
    """

    num_keys: int
    num_values: int
    dim: int = 0
    first: int = 0

    def width_of(self, shape: tuple[int, ...]) -> int:
        """Rows, or columns, of a head in a tensor of this shape."""
        return (shape[self.dim] - self.first) // self.num_values

    def in_order(self, x: Tensor) -> Tensor:
        """The same tensor, or a matrix of its rows' bytes, with the heads in our order."""
        before, heads = x.tensor_split((self.first,), dim=self.dim)
        repeats = self.num_values // self.num_keys
        around = heads.shape[: self.dim], heads.shape[self.dim + 1 :]
        tiles = heads.reshape(*around[0], repeats, self.num_keys, -1, *around[1])
        ordered = tiles.transpose(self.dim, self.dim + 1).flatten(self.dim, self.dim + 2)
        return torch.cat((before, ordered), dim=self.dim)


def tiled_heads(row: Mapping[str, Any], sizes: Mapping[str, int] | None) -> TiledHeads | None:
    """Those of a tensor; None if its heads are in our order, or if it has none.

    row     of tensors.json (store/prepare)
    sizes   its tiled_heads
    Raises  WeightError if the tensor cannot have that many heads"""
    if sizes is None or sizes["num_keys"] == sizes["num_values"]:
        return None
    layer_part = row["name"].split(".", 2)[-1]
    part = layer_part.removesuffix(".weight").removesuffix(".bias")
    if not row["name"].startswith("blk.") or part not in (*_BEHIND_KEYS, *_ROWS, *_COLUMNS):
        return None
    dim = 1 if part in _COLUMNS else 0
    first = 2 * sizes["num_keys"] * sizes["key_dim"] if part in _BEHIND_KEYS else 0
    shape, number = row["shape"], sizes["num_values"]
    if len(shape) <= dim or shape[dim] < first or (shape[dim] - first) % number:
        raise WeightError(f"{row['name']} {list(shape)} cannot have {number} heads of values")
    return TiledHeads(num_keys=sizes["num_keys"], num_values=number, dim=dim, first=first)
