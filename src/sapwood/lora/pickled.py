"""Reads the pickle of a table of tensors without running anything that a pickle may ask for.

`pickle.dumps({name: tensor})` describes a tensor by calls: `_rebuild_tensor_v2` of a storage, whose
bytes are those of `torch.save` in its older format. The reader here is a stack machine that knows
these calls and plain values. Every other operation and name is refused. Time and memory are bounded
by the length of the pickle.
Source: pickletools of Python; `Tensor.__reduce_ex__` and `_legacy_save` of PyTorch 2.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError

MAX_OPERATIONS = 2_000_000
"""Of one pickle, which takes some seconds; an adapter of 10,000 tensors has 500,000."""

MOST_SHARING = 2
"""Bytes of all tensors, which become tensors of their own, for each byte of the pickle."""

_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_STORAGE = "torch.storage._load_from_bytes"
_ORDERED = "collections.OrderedDict"
_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_DIMS = 8
_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
}
_BYTES = {**_DTYPES, "torch.ByteStorage": torch.uint8}
_SIZE = "torch.Size"
_BUCKET_ENTRY = "sglang.srt.weight_sync.tensor_bucket.FlattenedTensorMetadata"
_BUCKET_DTYPES = {f"torch.{name}": getattr(torch, name) for name in ("float64", "float32")} | {
    f"torch.{name}": getattr(torch, name) for name in ("float16", "bfloat16")
}
_COUNT = struct.Struct("<q")


V = TypeVar("V")
_DAMAGES = (
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    struct.error,
)


class _Refused(Exception):
    """The pickle has something else; the message says what."""


class _Global(str):
    """The name of what a pickle would import. Not a text that it has."""


def read_pickle(data: bytes, source: str) -> dict[str, Tensor]:
    """The tensors by name; `source` names the adapter in errors.

    Raises ConfigError for anything but a table of dense tensors of floats."""
    found = _guarded(lambda: _Machine(_Calls(len(data)).answer).run(io.BytesIO(data)), source)
    is_table = isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    )
    if not is_table:
        raise ConfigError(f"{source}: the pickle must have a dict of tensors by name")
    num_bytes = sum(tensor.nbytes for tensor in found.values())
    if num_bytes > MOST_SHARING * len(data):
        raise ConfigError(
            f"{source}: the tensors have {num_bytes} bytes, but the whole pickle has {len(data)}: "
            "many of them share one storage; send copies of their own"
        )
    return dict(found)


def read_weights(data: bytes, source: str) -> list[tuple[str, Tensor]]:
    """The tensors of a pickle of a dict by name, or of a list of (name, tensor).

    Raises ConfigError as `read_pickle` does."""
    found = _guarded(lambda: _Machine(_Calls(len(data)).answer).run(io.BytesIO(data)), source)
    pairs = list(found.items()) if isinstance(found, dict) else found
    if not isinstance(pairs, list) or not all(map(_is_named, pairs)):
        raise ConfigError(f"{source}: the pickle must have a list of (name, tensor)")
    return [(name, tensor) for name, tensor in pairs]


def read_bucket(data: bytes, source: str) -> list[tuple[str, Tensor]]:
    """The tensors of a pickle of {"flattened_tensor": bytes of all, "metadata": one entry for each:
    name, shape, dtype, start_idx, end_idx}, where they lie among these bytes.

    Raises ConfigError as `read_pickle` does, and for entries that are not within the bytes."""
    found = _guarded(lambda: _Machine(_BucketCalls(len(data)).answer).run(io.BytesIO(data)), source)
    is_bucket = isinstance(found, dict) and {"flattened_tensor", "metadata"} <= found.keys()
    flat = found["flattened_tensor"] if is_bucket else None
    entries = found["metadata"] if is_bucket else None
    if not isinstance(flat, Tensor) or flat.dtype != torch.uint8 or not isinstance(entries, list):
        raise ConfigError(f"{source}: the pickle must have metadata, and bytes: flattened_tensor")
    flat = flat.flatten()
    return _guarded(lambda: [_from_bucket(flat, entry) for entry in entries], source)


def _from_bucket(flat: Tensor, entry: Any) -> tuple[str, Tensor]:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise _Refused("an entry of metadata has no name")
    dtype = _BUCKET_DTYPES.get(entry["dtype"])
    start, end, shape = entry["start_idx"], entry["end_idx"], tuple(entry["shape"])
    sizes = (start, end, *shape)
    if dtype is None or not all(type(size) is int and size >= 0 for size in sizes):
        raise _Refused(f"{entry['name'][:200]} has a wrong dtype, shape or place")
    if not start <= end <= flat.numel() or math.prod(shape) * dtype.itemsize != end - start:
        raise _Refused(f"{entry['name'][:200]} does not lie within the bytes")
    numbers = flat[start:end]
    if start % dtype.itemsize:
        numbers = numbers.clone()  # a view of wider numbers must begin at a multiple of their size
    return entry["name"], numbers.view(dtype).view(shape)


def _is_named(pair: Any) -> bool:
    is_pair = isinstance(pair, tuple | list) and len(pair) == 2
    return is_pair and isinstance(pair[0], str) and isinstance(pair[1], Tensor)


def _guarded(read: Callable[[], V], source: str) -> V:
    try:
        return read()
    except _Refused as error:
        raise ConfigError(
            f"{source}: the pickle cannot be read: {error}; send pickle.dumps of tensors on the "
            "CPU, or the bytes of safetensors.torch.save with load_format safetensors"
        ) from None
    except _DAMAGES as error:
        raise ConfigError(f"{source}: the pickle is damaged: {error}") from error


class _Machine:
    """A pickle's stack, as far as plain values, and calls that `call` answers, need it."""

    def __init__(self, call: Callable[[str, tuple[Any, ...]], Any]) -> None:
        self._call = call
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, file: io.BytesIO) -> Any:
        """The value of the pickle that begins here; the file stands behind it afterwards."""
        for number, (operation, argument, _) in enumerate(pickletools.genops(file)):
            if operation.name == "STOP":
                return self._stack.pop()
            if number >= MAX_OPERATIONS:
                raise _Refused(f"it has over {MAX_OPERATIONS} operations")
            self._do(operation.name, argument)
        raise _Refused("it ends early")

    def _do(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "SHORT_BINUNICODE" | "BINUNICODE":
                stack.append(argument)
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(self._popped(int(name[-1])))
            case "TUPLE":
                stack.append(self._since_mark())
            case "APPEND":
                (value,) = self._popped(1)
                self._top(list).append(value)
            case "APPENDS":
                values = self._since_mark()
                self._top(list).extend(values)
            case "SETITEM":
                key, value = self._popped(2)
                self._top(dict)[_key(key)] = value
            case "SETITEMS":
                pairs = self._since_mark()
                keys = map(_key, pairs[::2])
                self._top(dict).update(zip(keys, pairs[1::2], strict=True))
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(_global(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                module, attribute = self._popped(2)
                if not isinstance(module, str) or not isinstance(attribute, str):
                    raise _Refused("it names something that is no name")
                stack.append(_global(f"{module}.{attribute}"))
            case "REDUCE":
                called, arguments = self._popped(2)
                stack.append(self._call(called, arguments))
            case "NEWOBJ":
                called, arguments = self._popped(2)
                stack.append(self._call(called, arguments))
            case "BUILD":
                (state,) = self._popped(1)
                if not isinstance(state, dict):
                    raise _Refused("an object has no attributes by name")
                self._top(dict).update(state)
            case "BINPERSID":
                stack.append(self._call("a persistent id", *self._popped(1)))
            case _:
                raise _Refused(f"it has the operation {name}")

    def _popped(self, count: int) -> tuple[Any, ...]:
        if len(self._stack) < count + (self._marks[-1] if self._marks else 0):
            raise _Refused("it takes more values than there are")
        taken = tuple(self._stack[-count:])
        del self._stack[-count:]
        return taken

    def _since_mark(self) -> tuple[Any, ...]:
        first = self._marks.pop()
        taken = tuple(self._stack[first:])
        del self._stack[first:]
        return taken

    def _top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise _Refused(f"it fills something that is no {kind.__name__}")
        return self._stack[-1]


def _key(value: Any) -> str | int:
    """A dict's key. A tuple could hold itself twice over, level by level: such ones take hours to
    hash, or to print."""
    if not isinstance(value, str | int):
        raise _Refused("a dict has keys that are no names")
    return value


def _global(name: str) -> _Global:
    if name.startswith("torch.multiprocessing."):
        raise _Refused(
            f"it has handles to the memory of another process ({name}), not the tensors themselves"
        )
    return _Global(name)


class _Calls:
    """Answers the calls of one pickle, and of the pickles inside its storages.

    A pickle may call for the same bytes as often as it likes, in a few bytes each time: they become
    one storage. And all storages together have no more bytes than the pickle.
    """

    dtypes: Mapping[str, torch.dtype] = _DTYPES

    def __init__(self, num_bytes: int) -> None:
        """num_bytes: of the whole pickle"""
        self._num_left = num_bytes
        self._storages: dict[int, tuple[bytes, Tensor]] = {}

    def answer(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if not isinstance(name, _Global) or not isinstance(arguments, tuple):
            raise _Refused("it calls something that is no name")
        match name:
            case _ if name == _ORDERED and not arguments:
                return {}
            case _ if name == _STORAGE and len(arguments) == 1:
                return self._storage(arguments[0])
            case _ if name == _TENSOR and len(arguments) >= 5:
                return _tensor(*arguments[:4])
            case _ if name == _PARAMETER and arguments and isinstance(arguments[0], Tensor):
                return arguments[0]
        raise _Refused(f"it calls {name[:200]}")

    def _storage(self, data: Any) -> Tensor:
        if not isinstance(data, bytes):
            raise _Refused("a storage has no bytes")
        known = self._storages.get(id(data))
        if known is not None:
            return known[1]
        self._num_left -= len(data)
        if self._num_left < 0:
            raise _Refused("its storages have more bytes than it has itself")
        made = _storage(data, self.answer, self.dtypes)
        # With the bytes, so that no other object can have their id.
        self._storages[id(data)] = data, made
        return made


class _BucketCalls(_Calls):
    """And what a bucket has besides tensors; an entry is the dict of its attributes."""

    dtypes = _BYTES

    def answer(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if isinstance(name, _Global) and isinstance(arguments, tuple):
            if name == _BUCKET_ENTRY and not arguments:
                return {}
            if name == _SIZE and len(arguments) == 1 and isinstance(arguments[0], tuple | list):
                if len(arguments[0]) > _MAX_DIMS:
                    raise _Refused("a tensor has too many dimensions")
                return tuple(arguments[0])
        return super().answer(name, arguments)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    if not isinstance(storage, Tensor) or storage.ndim != 1:
        raise _Refused("a tensor is not made of a storage")
    sizes = [offset, *shape, *strides]
    if len(shape) > _MAX_DIMS or not all(type(size) is int and size >= 0 for size in sizes):
        raise _Refused("a tensor has a wrong shape")
    # Strides of 0 would make a tensor of any size out of one number.
    if math.prod(shape) > storage.numel():
        raise _Refused(f"a tensor of {list(shape)} has only {storage.numel()} numbers")
    return torch.as_strided(storage, shape, strides, offset)  # RuntimeError if it is not within


def _storage(
    data: bytes,
    call: Callable[[str, tuple[Any, ...]], Any],
    dtypes: Mapping[str, torch.dtype],
) -> Tensor:
    """The numbers [n] of a storage, as `torch.save` writes it in its older format: five pickles,
    then how many numbers there are, then the numbers."""
    file = io.BytesIO(data)
    magic, _, info = (_Machine(call).run(file) for _ in range(3))
    if magic != _MAGIC or not isinstance(info, dict) or info.get("little_endian") is not True:
        raise _Refused("a storage is not as PyTorch writes it on this kind of machine")
    dtype = _Machine(partial(_dtype_of, dtypes)).run(file)
    _Machine(call).run(file)  # the storage's key, which is not needed for one
    (count,) = _COUNT.unpack(file.read(_COUNT.size))
    numbers = bytearray(file.read())
    if not isinstance(dtype, torch.dtype) or count * dtype.itemsize != len(numbers):
        raise _Refused(f"a storage has {len(numbers)} bytes for {count} numbers")
    # frombuffer takes no empty buffer.
    return torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)


def _dtype_of(dtypes: Mapping[str, torch.dtype], _: str, pid: Any) -> torch.dtype:
    """The numbers' kind, by the persistent id ("storage", class, key, device, count, view)."""
    kind = pid[1] if isinstance(pid, tuple) and len(pid) > 1 else None
    if not isinstance(kind, str) or kind not in dtypes:
        named = kind[:100] if isinstance(kind, str) else "none"
        raise _Refused(f"a storage has numbers of the kind {named}, which are no floats")
    return dtypes[kind]
