"""Tensors that lie in a file as plain numbers, row after row: a rank reads its part alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sapwood.layers.targets import Slice, Target
from sapwood.models.loader.checkpoint import as_dtype
from sapwood.models.loader.reading import Stored, empty, read_bytes, read_columns


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainTensor:
    """The place of a tensor in its file.

    offset  bytes from the start of the file
    """

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def stored(
        self,
        dtype: torch.dtype | None,
        targets: Mapping[str, Target] | None,
        experts: Sequence[int] | None,
    ) -> Stored[Tensor]:
        """What is read of it; dtype, targets and experts: as in safetensors.iterate."""
        part, num_bytes = self._part(targets or {}), self.num_bytes
        read: Callable[[], Tensor] = partial(self._read, dtype, part)
        if experts and self.shape and max(experts) < self.shape[0]:
            read = partial(self._read_experts, dtype, experts)
            num_bytes = num_bytes // self.shape[0] * len(experts)
        elif part is not None:
            num_bytes = num_bytes // self.shape[part.dim] * part.size
        in_memory = max(self.dtype.itemsize, (dtype or self.dtype).itemsize)
        return Stored(
            name=self.name,
            file_bytes=num_bytes,
            num_bytes=num_bytes // self.dtype.itemsize * in_memory,
            read=read,
        )

    def _part(self, targets: Mapping[str, Target]) -> Slice | None:
        """The part of the tensor that its target places; None: the whole tensor."""
        target = targets.get(self.name)
        if target is None or self.shape != target.shape or len(self.shape) > 2:
            return None
        return target.part

    def _read(self, dtype: torch.dtype | None, part: Slice | None) -> Tensor:
        if part is None:
            data = read_bytes(self.path, self.offset, self.num_bytes)
            return as_dtype(data.view(self.dtype).view(self.shape), dtype)
        shape = list(self.shape)
        num_rows = shape[0]
        unit = self.num_bytes // num_rows
        shape[part.dim] = part.size
        if part.dim == 0:  # rows lie together
            data = read_bytes(self.path, self.offset + part.first * unit, part.size * unit)
        else:
            data = read_columns(
                self.path,
                self.offset,
                num_rows=num_rows,
                row_bytes=unit,
                first=part.first * self.dtype.itemsize,
                num_bytes=part.size * self.dtype.itemsize,
            )
        return as_dtype(data.view(self.dtype).view(shape), dtype)

    def _read_experts(self, dtype: torch.dtype | None, experts: Sequence[int]) -> Tensor:
        """Memory that nobody writes to takes none, so that the others' places cost nothing."""
        unit = self.num_bytes // self.shape[0]
        found: Tensor | None = None
        for expert in experts:
            data = read_bytes(self.path, self.offset + expert * unit, unit)
            part = as_dtype(data.view(self.dtype).view(self.shape[1:]), dtype)
            found = empty(self.shape, part.dtype) if found is None else found
            found[expert] = part
        assert found is not None, "a tensor without an expert of this rank is not read"
        return found
