"""Reads and checks the header of a GGUF file: its metadata and the table of its tensors.

The gguf library has a reader too, but it takes seconds for a vocabulary (it makes an array of every
string) and dies in numpy on a damaged file. The layout: ggml, docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from sapwood.base.errors import ModelSourceError

TENSOR_TYPES = (
    *("F32", "F16", "BF16"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS"),
)
"""What the loader can turn into numbers."""

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
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where a tensor lies.

    shape      as torch has it: the dimension that lies together in memory comes last
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
    """metadata: key to int, float, bool, str or a list of those."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[TensorEntry, ...]


def read_header(path: Path) -> GgufHeader:
    """Raises ModelSourceError, naming the file and the tensor, if anything is not right."""
    if path.stat().st_size < 24:
        raise ModelSourceError(f"{path} is too short to be a GGUF file; download it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(path, data)
        num_tensors, num_values = _preamble(cursor)
        metadata = {}
        for _ in range(num_values):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.number("I"))
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            cursor.fail(f"its alignment is {alignment!r}")
        table = [cursor.tensor() for _ in range(num_tensors)]
        start = math.ceil(cursor.position / alignment) * alignment
        tensors = tuple(_entry(path, len(data), start, *row) for row in table)
    names = [tensor.name for tensor in tensors]
    if len(set(names)) != len(names):
        raise ModelSourceError(f"{path} lists a tensor twice; convert the model again")
    return GgufHeader(path=path, metadata=metadata, tensors=tensors)


class _Cursor:
    """Reads little-endian values one after the other, never beyond the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self.position = 0

    def fail(self, what: str) -> NoReturn:
        raise ModelSourceError(
            f"{self._path} is not a GGUF file that sapwood can read: {what}; "
            f"download or convert the model again"
        )

    def bytes(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._data):
            self.fail(f"its header needs {end} bytes but the file ends at {len(self._data)}")
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        # A damaged vocabulary entry must not stop a model from loading; bytes that are no UTF-8
        # occur in real files.
        return self.bytes(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            self.fail(f"metadata of unknown type {kind}")
        element, count = self.number("I"), self.number("Q")
        if element in _SCALARS:
            code = _SCALARS[element]
            raw = self.bytes(count * struct.calcsize(f"<{code}"))
            return list(struct.unpack(f"<{count}{code}", raw))
        # Each element has a length of 8 bytes at least: refuse a huge count before looping over it.
        if count * 8 > len(self._data) - self.position:
            self.fail(f"an array of {count} elements is longer than the file")
        return [self.value(element) for _ in range(count)]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape in torch order, GGML type, offset within the data)."""
        name = self.string()
        num_dimensions = self.number("I")
        if num_dimensions > 8:
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
    return cursor.number("Q"), cursor.number("Q")


def _entry(
    path: Path,
    file_bytes: int,
    start: int,
    name: str,
    shape: tuple[int, ...],
    kind: int,
    offset: int,
) -> TensorEntry:
    known = {member.value: member for member in GGMLQuantizationType}
    type_name = known[kind].name if kind in known else f"number {kind}"
    if type_name not in TENSOR_TYPES:
        raise ModelSourceError(
            f"{path}: tensor {name} has type {type_name}, which sapwood cannot read; "
            f"known: {', '.join(TENSOR_TYPES)}"
        )
    elements, block_bytes = GGML_QUANT_SIZES[known[kind]]
    if not shape or shape[-1] % elements:
        raise ModelSourceError(
            f"{path}: tensor {name} has shape {shape}, but rows of {type_name} hold a multiple of "
            f"{elements} numbers; convert the model again"
        )
    num_bytes = math.prod(shape) // elements * block_bytes
    end = start + offset + num_bytes
    if end > file_bytes:
        raise ModelSourceError(
            f"{path} is truncated: tensor {name} ends at byte {end} but the file has {file_bytes}; "
            f"download it again"
        )
    return TensorEntry(
        name=name, shape=shape, type=type_name, offset=start + offset, num_bytes=num_bytes
    )
