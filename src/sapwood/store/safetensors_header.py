"""Reads and checks the header of a safetensors file before the file is mapped.

The layout: 8 bytes with the header's length, little-endian; the header, a JSON object from tensor
names to their data types, shapes and places; then the tensors, one after the other without gaps.
Source: the format's own description, huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sapwood.base.errors import WeightError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsEntry:
    """The place of a tensor in its file.

    dtype   one of DTYPE_BITS
    offset  bytes from the start of the file
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_safetensors_header(path: Path) -> tuple[SafetensorsEntry, ...]:
    """The tensors in the order in which they lie in the file.

    Raises WeightError, with file and tensor, if a size, an offset or a type is wrong, if tensors
    overlap or leave gaps, or if the file is shorter or longer than all tensors together.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if file_bytes < 8:
                _fail(path, f"it has {file_bytes} bytes, and its header's length alone takes 8")
            if length > MAX_HEADER_BYTES:
                _fail(path, f"its header claims {length} bytes, and the limit is 100 million")
            if 8 + length > file_bytes:
                _fail(path, f"its header ends at byte {8 + length} but the file at {file_bytes}")
            raw = file.read(length)
    except OSError as error:
        _fail(path, f"it cannot be read: {error.strerror}")
    return _entries(path, raw, file_bytes)


def read_sent_header(data: bytes, what: str) -> tuple[SafetensorsEntry, ...]:
    """The same of a file's bytes that somebody sent, as `what`."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or 8 + length > len(data):
        _fail(what, f"its {len(data)} bytes end before its header does")
    return _entries(what, data[8 : 8 + length], len(data))


def _entries(path: Path | str, raw: bytes, file_bytes: int) -> tuple[SafetensorsEntry, ...]:
    table, length = _parse(path, raw), len(raw)
    _check_notes(path, table.pop("__metadata__", None))
    entries = [_entry(path, name, said, 8 + length) for name, said in table.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    _check_places(path, entries, 8 + length, file_bytes)
    return tuple(entries)


def _fail(path: Path | str, what: str) -> NoReturn:
    way_out = "download the model again" if isinstance(path, Path) else "send all of its bytes"
    raise WeightError(f"{path} is not a whole safetensors file: {what}; {way_out}")


def _parse(path: Path | str, raw: bytes) -> dict[str, Any]:
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            _fail(path, f"its header has {twice!r} twice")
        return table

    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        _fail(path, f"its header is not JSON ({error})")
    if not isinstance(table, dict):
        _fail(path, "its header is not a JSON object")
    return table


def _check_notes(path: Path | str, notes: Any) -> None:
    """Raise WeightError unless __metadata__ is a table from texts to texts."""
    if notes is None:
        return
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        _fail(path, "its __metadata__ is not a table of texts")


def _entry(path: Path | str, name: str, said: Any, start: int) -> SafetensorsEntry:
    if not isinstance(said, dict) or set(said) != {"dtype", "shape", "data_offsets"}:
        _fail(path, f"tensor {name} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _fail(path, f"tensor {name} has the data type {dtype!r}; known: {', '.join(DTYPE_BITS)}")
    if not _are_sizes(shape):
        _fail(path, f"tensor {name} has the shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _fail(path, f"tensor {name} has the data_offsets {offsets!r}")
    num_bits = math.prod(shape) * DTYPE_BITS[dtype]
    num_bytes = offsets[1] - offsets[0]
    if num_bits != 8 * num_bytes:
        _fail(
            path,
            f"tensor {name} is {dtype} of shape {shape}, which takes {num_bits / 8:g} bytes, but "
            f"its place has {num_bytes}",
        )
    return SafetensorsEntry(
        name=name, dtype=dtype, shape=tuple(shape), offset=start + offsets[0], num_bytes=num_bytes
    )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _check_places(
    path: Path | str, entries: Sequence[SafetensorsEntry], start: int, file_bytes: int
) -> None:
    end, before = start, "its header"
    for entry in entries:
        if entry.offset != end:
            relation = "overlaps" if entry.offset < end else "leaves a gap after"
            _fail(path, f"tensor {entry.name} at byte {entry.offset} {relation} {before}")
        end, before = entry.offset + entry.num_bytes, entry.name
    if end != file_bytes:
        _fail(path, f"its tensors end at byte {end} but the file at {file_bytes}")
