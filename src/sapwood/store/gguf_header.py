"""Reads and checks the header of a GGUF file: its metadata and the table of its tensors.

The gguf library has a reader too, but it takes seconds for a vocabulary (it makes an array of every
string) and dies in numpy on a damaged file. The layout: ggml, docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from sapwood.base.errors import ModelSourceError

TENSOR_TYPES = (
    *("F32", "F16", "BF16"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4"),
)
"""The tensor types that the loader can read."""

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_DEFAULT_ALIGNMENT = 32
_LEAST_VALUE_BYTES, _LEAST_TENSOR_BYTES = 13, 24
"""Smallest sizes of a metadata value and of an entry in the table of tensors."""
_MAX_DIMENSIONS = 4
_MAX_DEPTH = 4
_MAX_ALIGNMENT = 1 << 20
_MAX_NAME_BYTES = 1 << 16
_MAX_HEADER_BYTES = 1 << 28
_MAX_ELEMENTS = 1 << 24
"""Elements of all arrays together. A vocabulary of 256,000 tokens has two million, in 16 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """The place of a tensor in its file.

    shape      in torch's order: the dimension that is contiguous in memory comes last
    type       name of its GGML type, one of TENSOR_TYPES
    offset     bytes from the start of the file
    num_bytes  size in the file
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """The header of a GGUF file.

    metadata  key -> int, float, bool, str, or a list of these
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[TensorEntry, ...]


def read_header(path: Path) -> GgufHeader:
    """Read the header. ModelSourceError, with file and tensor, if anything in it is wrong."""
    if path.stat().st_size < 24:
        raise ModelSourceError(f"{path} is too short to be a GGUF file; download it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(path, data)
        num_tensors, num_values = _preamble(cursor)
        metadata = _metadata(cursor, num_values)
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not _is_alignment(alignment):
            cursor.fail(f"its alignment is {alignment!r}, which is no power of two up to 2^20")
        table = [cursor.tensor() for _ in range(num_tensors)]
        tensors = _place(path, len(data), cursor.position, alignment, table)
    return GgufHeader(path=path, metadata=metadata, tensors=tensors)


def _metadata(cursor: _Cursor, num_values: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.name("a metadata key")
        if key in metadata:
            cursor.fail(f"its metadata has {key} twice")
        metadata[key] = cursor.value(cursor.number("I"))
    return metadata


def _is_alignment(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MAX_ALIGNMENT and value & (value - 1) == 0


class _Cursor:
    """Reads little-endian values one after the other, never beyond the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._num_elements = 0
        self.position = 0

    @property
    def num_bytes_left(self) -> int:
        return len(self._data) - self.position

    def fail(self, what: str) -> NoReturn:
        raise ModelSourceError(
            f"{self._path} is not a GGUF file that sapwood can read: {what}; "
            f"download or convert the model again"
        )

    def bytes(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._data):
            self.fail(f"its header needs {end} bytes but the file ends at {len(self._data)}")
        if end > _MAX_HEADER_BYTES:
            self.fail(f"its header needs {end} bytes, and more than {_MAX_HEADER_BYTES} is absurd")
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        # A damaged vocabulary entry must not stop a model from loading; bytes that are no UTF-8
        # occur in real files.
        return self.bytes(self.number("Q")).decode("utf-8", "replace")

    def name(self, what: str) -> str:
        """Read a name, which must be valid UTF-8 because other entries refer to it."""
        count = self.number("Q")
        if count > _MAX_NAME_BYTES:
            self.fail(f"{what} has {count} bytes, and more than {_MAX_NAME_BYTES} is absurd")
        raw = self.bytes(count)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8: {raw[:64]!r}")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _BOOL:
            return self.boolean()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            self.fail(f"metadata of unknown type {kind}")
        if depth == _MAX_DEPTH:
            self.fail(f"its metadata has arrays in more than {_MAX_DEPTH} levels")
        element, count = self.number("I"), self.number("Q")
        self._num_elements += count
        if self._num_elements > _MAX_ELEMENTS:
            self.fail(f"its metadata has an array of {count} elements, which is absurd")
        if element in _SCALARS and element != _BOOL:
            code = _SCALARS[element]
            raw = self.bytes(count * struct.calcsize(f"<{code}"))
            return list(struct.unpack(f"<{count}{code}", raw))
        return [self.value(element, depth + 1) for _ in range(count)]

    def boolean(self) -> bool:
        value = self.number("B")
        if value > 1:
            self.fail(f"its metadata has a truth value of {value}")
        return bool(value)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape in torch order, GGML type, offset within the data)."""
        name = self.name("a tensor's name")
        num_dimensions = self.number("I")
        if num_dimensions > _MAX_DIMENSIONS:
            self.fail(f"tensor {name} has {num_dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(num_dimensions))
        return name, shape[::-1], self.number("I"), self.number("Q")


def _preamble(cursor: _Cursor) -> tuple[int, int]:
    """(number of tensors, number of metadata values)."""
    magic = cursor.bytes(4)
    if magic != b"GGUF":
        cursor.fail(f"it starts with {magic!r} instead of b'GGUF'")
    version = cursor.number("I")
    if version & 0xFFFF == 0:
        cursor.fail("it is in big-endian byte order")
    if version not in (2, 3):
        cursor.fail(f"it has version {version}, and only 2 and 3 are known")
    num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
    needed = num_tensors * _LEAST_TENSOR_BYTES + num_values * _LEAST_VALUE_BYTES
    if needed > cursor.num_bytes_left:
        cursor.fail(
            f"its header needs {needed} bytes for {num_tensors} tensors and {num_values} values, "
            f"but the file has only {cursor.num_bytes_left} more"
        )
    return num_tensors, num_values


_Row = tuple[str, tuple[int, ...], int, int]


def _place(
    path: Path, file_bytes: int, header_bytes: int, alignment: int, table: Sequence[_Row]
) -> tuple[TensorEntry, ...]:
    """Check that tensors lie one after the other in the table's order and fill the file.

    Each tensor begins at the next multiple of the alignment.
    """
    start = _aligned(header_bytes, alignment)
    entries = tuple(_entry(path, start, *row) for row in table)
    names: set[str] = set()
    end = start
    for entry in entries:
        if entry.name in names:
            raise ModelSourceError(f"{path} lists tensor {entry.name} twice; download it again")
        names.add(entry.name)
        if entry.offset != _aligned(end, alignment):
            relation = "overlaps what comes before it" if entry.offset < end else "leaves a gap"
            raise ModelSourceError(
                f"{path}: tensor {entry.name} at byte {entry.offset} {relation}: "
                f"{_aligned(end, alignment)} is its place; download or convert the model again"
            )
        end = entry.offset + entry.num_bytes
        if end > file_bytes:
            raise ModelSourceError(
                f"{path} is truncated: tensor {entry.name} ends at byte {end} but the file has "
                f"{file_bytes}; download it again"
            )
    if entries and file_bytes > _aligned(end, alignment):
        raise ModelSourceError(
            f"{path} has {file_bytes} bytes but its tensors end at byte {end}; download or convert "
            "the model again"
        )
    return entries


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _entry(
    path: Path, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> TensorEntry:
    known = {member.value: member for member in GGMLQuantizationType}
    type_name = known[kind].name if kind in known else f"number {kind}"
    if type_name not in TENSOR_TYPES:
        raise ModelSourceError(
            f"{path}: tensor {name} has type {type_name}, which sapwood cannot read; "
            f"known: {', '.join(TENSOR_TYPES)}"
        )
    elements, block_bytes = GGML_QUANT_SIZES[known[kind]]
    if not shape or 0 in shape or shape[-1] % elements:
        raise ModelSourceError(
            f"{path}: tensor {name} has shape {shape}, but rows of {type_name} hold a multiple of "
            f"{elements} numbers; convert the model again"
        )
    num_bytes = math.prod(shape) // elements * block_bytes
    return TensorEntry(
        name=name, shape=shape, type=type_name, offset=start + offset, num_bytes=num_bytes
    )
