"""Tensors of safetensors files, one or many."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.layers.targets import Target
from sapwood.models.loader.checkpoint import Expected, as_dtype
from sapwood.models.loader.reading import Advance, Stored, ignore, read_ahead, read_bytes
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
    targets: Mapping[str, Target] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """As `weights.iterate_weights`; with None as dtype, every tensor in its own.

    targets  by the names in the checkpoint: where a rank places some rows of a tensor only, these
             are read and come alone, without the others
    """
    expected = Expected(files)
    tensors: list[Stored[Tensor]] = []
    for path in files.weights:
        entries = read_safetensors_header(path)
        expected.check(path, (entry.name for entry in entries))
        tensors += [_stored(path, _rows(entry, targets or {}), dtype) for entry in entries]
    return read_ahead(tensors, advance=advance)


def names(files: ModelFiles) -> list[str]:
    """Of all tensors, from the files' headers."""
    return [entry.name for path in files.weights for entry in read_safetensors_header(path)]


def _rows(entry: SafetensorsEntry, targets: Mapping[str, Target]) -> SafetensorsEntry:
    """The rows of the tensor that its target places, which lie together; or the whole tensor."""
    target = targets.get(entry.name)
    part = None if target is None else target.part
    if part is None or part.dim != 0 or target is None or entry.shape != target.shape:
        return entry
    row_bytes = entry.num_bytes // entry.shape[0]
    return replace(
        entry,
        shape=(part.size, *entry.shape[1:]),
        offset=entry.offset + part.first * row_bytes,
        num_bytes=part.size * row_bytes,
    )


def _stored(path: Path, entry: SafetensorsEntry, dtype: torch.dtype | None) -> Stored[Tensor]:
    own = DTYPES.get(entry.dtype)
    if own is None:
        raise WeightError(
            f"{path}: tensor {entry.name} has data type {entry.dtype}, which sapwood cannot read; "
            f"known: {', '.join(DTYPES)}"
        )
    return Stored(
        name=entry.name,
        file_bytes=entry.num_bytes,
        num_bytes=max(entry.num_bytes, math.prod(entry.shape) * (dtype or own).itemsize),
        read=partial(_read, path, entry, own, dtype),
    )


def _read(
    path: Path, entry: SafetensorsEntry, own: torch.dtype, dtype: torch.dtype | None
) -> Tensor:
    data = read_bytes(path, entry.offset, entry.num_bytes)
    return as_dtype(data.view(own).view(entry.shape), dtype)
