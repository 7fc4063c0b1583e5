"""Tensors of safetensors files, one or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.layers.targets import Slice, Target
from sapwood.models.loader.checkpoint import Expected, as_dtype
from sapwood.models.loader.needed import Experts, no_experts
from sapwood.models.loader.reading import (
    Advance,
    Stored,
    Wanted,
    empty,
    every,
    ignore,
    read_ahead,
    read_bytes,
    read_columns,
)
from sapwood.store.files import ModelFiles
from sapwood.store.safetensors_header import SafetensorsEntry, read_safetensors_header

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def iterate(
    files: ModelFiles,
    dtype: torch.dtype | None,
    advance: Advance = ignore,
    wanted: Wanted = every,
    targets: Mapping[str, Target] | None = None,
    experts: Experts = no_experts,
) -> Iterator[tuple[str, Tensor]]:
    """As `weights.iterate_weights`; with None as dtype, every tensor in its own.

    targets  by the names in the checkpoint: where a rank places some rows or columns of a tensor
             only, these are read and come alone, without the others
    experts  by the names in the checkpoint: the experts of a tensor [experts, …] that are read. It
             comes whole, with any numbers in place of the others
    """
    expected = Expected(files)
    tensors: list[Stored[Tensor]] = []
    for path in files.weights:
        entries = read_safetensors_header(path)
        expected.check(path, (entry.name for entry in entries))
        tensors += [
            _stored(path, one, dtype, _slice(one, targets or {}), experts(one.name))
            for one in entries
            if wanted(one.name)
        ]
    return read_ahead(tensors, advance=advance)


def _read_experts(
    path: Path,
    entry: SafetensorsEntry,
    own: torch.dtype,
    dtype: torch.dtype | None,
    experts: Sequence[int],
) -> Tensor:
    """Memory that nobody writes to takes none, so that the others' places cost nothing."""
    unit = entry.num_bytes // entry.shape[0]
    found: Tensor | None = None
    for expert in experts:
        data = read_bytes(path, entry.offset + expert * unit, unit)
        part = as_dtype(data.view(own).view(entry.shape[1:]), dtype)
        found = empty(entry.shape, part.dtype) if found is None else found
        found[expert] = part
    assert found is not None, "a tensor without an expert of this rank is not read"
    return found


def shapes(files: ModelFiles) -> dict[str, tuple[int, ...]]:
    """Of all tensors by name, from the files' headers."""
    return {
        entry.name: tuple(entry.shape)
        for path in files.weights
        for entry in read_safetensors_header(path)
    }


def _slice(entry: SafetensorsEntry, targets: Mapping[str, Target]) -> Slice | None:
    """The part of the tensor that its target places; None: the whole tensor."""
    target = targets.get(entry.name)
    if target is None or entry.shape != target.shape or len(entry.shape) > 2:
        return None
    return target.part


def _stored(
    path: Path,
    entry: SafetensorsEntry,
    dtype: torch.dtype | None,
    part: Slice | None,
    experts: Sequence[int] | None,
) -> Stored[Tensor]:
    own = DTYPES.get(entry.dtype)
    read: Callable[[], Tensor]
    if own is None:
        raise WeightError(
            f"{path}: tensor {entry.name} has data type {entry.dtype}, which sapwood cannot read; "
            f"known: {', '.join(DTYPES)}"
        )
    num_bytes = entry.num_bytes
    read = partial(_read, path, entry, own, dtype, part)
    if experts and entry.shape and max(experts) < entry.shape[0]:
        read = partial(_read_experts, path, entry, own, dtype, experts)
        num_bytes = num_bytes // entry.shape[0] * len(experts)
    elif part is not None:
        num_bytes = num_bytes // entry.shape[part.dim] * part.size
    return Stored(
        name=entry.name,
        file_bytes=num_bytes,
        num_bytes=num_bytes // own.itemsize * max(own.itemsize, (dtype or own).itemsize),
        read=read,
    )


def _read(
    path: Path,
    entry: SafetensorsEntry,
    own: torch.dtype,
    dtype: torch.dtype | None,
    part: Slice | None,
) -> Tensor:
    if part is None:
        data = read_bytes(path, entry.offset, entry.num_bytes)
        return as_dtype(data.view(own).view(entry.shape), dtype)
    shape = list(entry.shape)
    shape[part.dim] = part.size
    unit = entry.num_bytes // entry.shape[0]
    if part.dim == 0:  # rows lie together
        data = read_bytes(path, entry.offset + part.first * unit, part.size * unit)
    else:
        data = read_columns(
            path,
            entry.offset,
            num_rows=entry.shape[0],
            row_bytes=unit,
            first=part.first * own.itemsize,
            num_bytes=part.size * own.itemsize,
        )
    return as_dtype(data.view(own).view(shape), dtype)
