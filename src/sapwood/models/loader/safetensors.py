"""Tensors of safetensors files, one or many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.layers.targets import Target
from sapwood.models.loader.checkpoint import Expected
from sapwood.models.loader.needed import Experts, no_experts
from sapwood.models.loader.plain import PlainTensor
from sapwood.models.loader.reading import Advance, Stored, Wanted, every, ignore, read_ahead
from sapwood.store.files import ModelFiles
from sapwood.store.safetensors_header import (
    SafetensorsEntry,
    read_safetensors_header,
    read_sent_header,
)

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
            _place(path, one).stored(dtype, targets, experts(one.name))
            for one in entries
            if wanted(one.name)
        ]
    return read_ahead(tensors, advance=advance)


def shapes(files: ModelFiles) -> dict[str, tuple[int, ...]]:
    """Of all tensors by name, from the files' headers."""
    return {
        entry.name: tuple(entry.shape)
        for path in files.weights
        for entry in read_safetensors_header(path)
    }


def sent(data: bytes, what: str, *, with_numbers: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file that somebody sent, each copied only when it is asked for.

    what          the name of the bytes in errors
    with_numbers  if not, tensors come on torch's meta device
    Raises        WeightError, at the first, if the bytes are no such file"""
    for entry in read_sent_header(data, what):
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise WeightError(f"{what}: the data type {entry.dtype} of {entry.name} is not read")
        if not with_numbers or not entry.num_bytes:
            yield entry.name, torch.empty(entry.shape, dtype=dtype, device="meta")
            continue
        numbers = bytearray(memoryview(data)[entry.offset : entry.offset + entry.num_bytes])
        yield entry.name, torch.frombuffer(numbers, dtype=dtype).view(entry.shape)


def _place(path: Path, entry: SafetensorsEntry) -> PlainTensor:
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise WeightError(
            f"{path}: tensor {entry.name} has data type {entry.dtype}, which sapwood cannot read; "
            f"known: {', '.join(DTYPES)}"
        )
    return PlainTensor(
        name=entry.name,
        path=path,
        dtype=dtype,
        shape=tuple(entry.shape),
        offset=entry.offset,
        num_bytes=entry.num_bytes,
    )
