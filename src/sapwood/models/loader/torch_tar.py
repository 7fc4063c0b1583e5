"""Checkpoints in the tar format of PyTorch before 0.2, read without running any code in them.

Such an archive has three members: "storages" has the numbers behind the tensors, with a pickle that
describes each storage; "tensors" says how tensors view storages; "pickle" is the saved object,
which refers to tensors by their keys. PyTorch lets these pickles call any code; the reader here
allows only the names that a table of tensors needs. Source: `_legacy_load` in
torch/serialization.py of PyTorch 0.1.12 and later.
"""

from __future__ import annotations

import pickle
import struct
import tarfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_KINDS = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
}
_COUNT, _NUMBER = struct.Struct("<i4x"), struct.Struct("<q")
_MAX_DIMS = 64


class DamagedTar(Exception):
    """The archive is damaged; the message says how."""


def read_tar(path: Path) -> Any:
    """The saved object, which for a checkpoint is a table of tensors, all read into memory.

    Raises pickle.UnpicklingError if the archive refers to anything else, and DamagedTar or any
    error
    of the pickle module if the archive is damaged."""
    with tarfile.open(path, mode="r:") as archive:
        storages = _storages(_member(archive, "storages"))
        tensors = _tensors(_member(archive, "tensors"), storages)
        return _Unpickler(_member(archive, "pickle"), tensors).load()


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise DamagedTar(f"it has no member {name!r}")
    return file


def _storages(file: IO[bytes]) -> dict[Any, Tensor]:
    """One-dimensional tensors by key."""
    found: dict[Any, Tensor] = {}
    for _ in range(_load(file, int)):
        key, location, dtype = _load(file, tuple, 3)
        if not isinstance(dtype, torch.dtype):
            raise DamagedTar(f"storage {key!r} at {location!r} is of no known type")
        (count,) = _NUMBER.unpack(_exactly(file, _NUMBER.size))
        found[key] = _numbers(_exactly(file, count * dtype.itemsize), dtype)
    for view in _load(file, list):
        key, root, offset, count = _of_length(view, 4)
        whole = found[root]
        if not (0 <= offset <= offset + count <= len(whole)):
            raise DamagedTar(f"storage {key!r} is no part of {root!r}")
        found[key] = whole[offset : offset + count]
    return found


def _tensors(file: IO[bytes], storages: Mapping[Any, Tensor]) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for _ in range(_load(file, int)):
        key, storage, _ = _load(file, tuple, 3)
        (num_dims,) = _COUNT.unpack(_exactly(file, _COUNT.size))
        if not 0 <= num_dims <= _MAX_DIMS:
            raise DamagedTar(f"tensor {key!r} has {num_dims} dimensions")
        sizes = struct.Struct(f"<{2 * num_dims + 1}q")
        *numbers, offset = sizes.unpack(_exactly(file, sizes.size))
        shape, strides = numbers[:num_dims], numbers[num_dims:]
        # Raises RuntimeError if the tensor is not within its storage.
        found[int(key)] = torch.as_strided(storages[storage], shape, strides, offset)
    return found


def _numbers(data: bytearray, dtype: torch.dtype) -> Tensor:
    # frombuffer takes no empty buffer.
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _exactly(file: IO[bytes], size: int) -> bytearray:
    here = file.tell()
    left = file.seek(0, 2) - here
    file.seek(here)
    if not 0 <= size <= left:
        raise DamagedTar(f"it has {left} bytes where {size} should be")
    data = bytearray(file.read(size))
    if len(data) != size:
        raise DamagedTar("it ends early")
    return data


def _load(file: IO[bytes], kind: type, length: int | None = None) -> Any:
    found = _Unpickler(file, {}).load()
    if not isinstance(found, kind):
        raise DamagedTar(f"it has a {type(found).__name__} where a {kind.__name__} should be")
    return found if length is None else _of_length(found, length)


def _of_length(found: Any, length: int) -> Any:
    if not isinstance(found, (tuple, list)) or len(found) != length:
        raise DamagedTar(f"it has {found!r} where {length} things should be")
    return found


class _Unpickler(pickle.Unpickler):
    """Allows ordered dicts, and types of tensors and storages, which stand for their dtypes."""

    def __init__(self, file: IO[bytes], tensors: Mapping[int, Tensor]) -> None:
        super().__init__(file, encoding="utf-8")
        self._tensors = tensors

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        kind = name.removesuffix("Storage").removesuffix("Tensor")
        if module == "torch" and kind in _KINDS and kind != name:
            return _KINDS[kind]
        raise pickle.UnpicklingError(f"it calls for the global {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return self._tensors[int(pid)]
