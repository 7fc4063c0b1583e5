"""Tensors read ahead of their use by a few threads, so that reading and packing overlap.

Files are read, not mapped: pages of a mapped file count as this process's memory until something
else drives them out, and a file that shrinks while it is mapped ends the process with a signal.
"""

from __future__ import annotations

import math
import mmap
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sapwood.base.errors import WeightError

NUM_READERS = 4
AHEAD_BYTES = 8 << 20
AHEAD_SHARE = 1 / 32
"""Share of the checkpoint's size that is read ahead, if that is more than AHEAD_BYTES.

A tensor that is larger than this is read alone.
"""

_OWN_MEMORY_BYTES = 128 << 10
"""A tensor of at least this size gets memory straight from the operating system.

The system gets this memory back as soon as the tensor is dropped. An allocator would keep some of
it, in holes between memory that is still in use.
"""

W = TypeVar("W")
Advance = Callable[[int], None]
"""Called with the number of the checkpoint's bytes that have been read since the last call."""

Wanted = Callable[[str], bool]
"""Whether the tensor of that name in the checkpoint is to be read."""


def every(name: str) -> bool:
    """A Wanted of all tensors."""
    del name
    return True


def ignore(num_bytes: int) -> None:
    """An Advance that does nothing."""
    del num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored(Generic[W]):
    """A tensor that has not been read yet.

    file_bytes  size of the tensor in its file
    num_bytes   size in memory from the reading to the use
    read        reads the tensor, in any thread; WeightError if the file does not hold it
    """

    name: str
    file_bytes: int
    num_bytes: int
    read: Callable[[], W]


def read_ahead(
    tensors: Iterable[Stored[W]], *, advance: Advance = ignore, num_readers: int = NUM_READERS
) -> Iterator[tuple[str, W]]:
    """Every tensor, once, in the order of `in_layer_order`."""
    ordered = in_layer_order(tensors)
    ahead_bytes = max(AHEAD_BYTES, int(sum(tensor.file_bytes for tensor in ordered) * AHEAD_SHARE))
    waiting = deque(ordered)
    reading: deque[tuple[Stored[W], Future[W]]] = deque()
    in_flight = 0
    with ThreadPoolExecutor(num_readers, thread_name_prefix="weights") as pool:
        try:
            while waiting or reading:
                while waiting and (not reading or in_flight + waiting[0].num_bytes <= ahead_bytes):
                    stored = waiting.popleft()
                    reading.append((stored, pool.submit(stored.read)))
                    in_flight += stored.num_bytes
                stored, future = reading.popleft()
                result = [future.result()]
                del future
                advance(stored.file_bytes)
                # Popped, so that the tensor is freed as soon as its user drops it.
                yield stored.name, result.pop()
                in_flight -= stored.num_bytes
        finally:
            for _, unfinished in reading:
                unfinished.cancel()


def in_layer_order(tensors: Iterable[Stored[W]]) -> Sequence[Stored[W]]:
    """The tensors outside of all layers, the largest first, and then layer by layer.

    So a layer can be packed, and its tensors dropped, while the next layer is read; and the largest
    tensors, those of an embedding, come while there is still little else in memory.
    """

    def place(stored: Stored[W]) -> tuple[bool, int, tuple[int, ...]]:
        numbers = tuple(int(number) for number in re.findall(r"\.(\d+)\.", stored.name))
        return bool(numbers), 0 if numbers else -stored.num_bytes, numbers

    return sorted(tensors, key=place)


def read_bytes(path: Path, offset: int, num_bytes: int) -> Tensor:
    """A part of a file, [num_bytes] uint8, in memory of its own.

    Raises WeightError if the file cannot be read or ends before it."""
    memory = _memory(num_bytes)
    target = memoryview(memory)
    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            while done < num_bytes:
                count = os.preadv(file.fileno(), [target[done:]], offset + done)
                if count == 0:
                    break
                done += count
    except OSError as error:
        raise WeightError(f"{path} cannot be read: {error}") from error
    if done < num_bytes:
        raise WeightError(
            f"{path} ends before byte {offset + num_bytes}, up to which a tensor lies; "
            "download the model again"
        )
    return torch.frombuffer(memory, dtype=torch.uint8)[:num_bytes]


def read_columns(
    path: Path, offset: int, *, num_rows: int, row_bytes: int, first: int, num_bytes: int
) -> Tensor:
    """Bytes first .. first + num_bytes of each row of a matrix in a file, [num_rows * num_bytes]
    uint8, in memory of their own.

    Raises WeightError if the file cannot be read or ends before them."""
    memory = _memory(num_rows * num_bytes)
    target = memoryview(memory)
    try:
        with path.open("rb", buffering=0) as file:
            for row in range(num_rows):
                at = offset + row * row_bytes + first
                if os.preadv(
                    file.fileno(), [target[row * num_bytes : (row + 1) * num_bytes]], at
                ) < (num_bytes):
                    raise WeightError(
                        f"{path} ends before byte {at + num_bytes}, up to which a tensor lies; "
                        "download the model again"
                    )
    except OSError as error:
        raise WeightError(f"{path} cannot be read: {error}") from error
    return torch.frombuffer(memory, dtype=torch.uint8)[: num_rows * num_bytes]


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in memory of its own."""
    numbers = math.prod(shape)
    memory = _memory(numbers * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype)[:numbers].view(tuple(shape))


def _memory(num_bytes: int) -> mmap.mmap | bytearray:
    if num_bytes < _OWN_MEMORY_BYTES:
        return bytearray(num_bytes or 8)  # torch takes no empty buffer
    return mmap.mmap(-1, num_bytes)
