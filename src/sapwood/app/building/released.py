"""Memory that an engine gives back to the operating system, and takes again.

The addresses stay: the system takes the pages behind them and hands out empty ones at the next
touch, so that recorded steps, page tables and views stay valid. Only large pieces are released, and
of weights only what can come back: from a copy in a file, or by filling the model again.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Collection, Iterator, Sequence
from typing import IO, Any

import torch
from torch import Tensor

from sapwood.base.errors import InvalidRequest
from sapwood.schema.config.memory import MemoryConfig
from sapwood.schema.weights import MEMORY_TAGS

LEAST_BYTES = 1 << 20
"""Smaller pieces stay: what is around them in the same page would be lost."""
_PAGE_BYTES = 4096
_MADV_DONTNEED = 4
_FILLED_AGAIN = (
    "sapwood.kernels.cpu.linear",
    "sapwood.kernels.cpu.quantized",
    "sapwood.kernels.torch_ops.linear",
    "sapwood.layers.embedding",
)
"""Modules whose objects hold nothing but weights, which a checkpoint fills again."""

Piece = tuple[int, int]
"""(address, bytes)"""


class ReleasableMemory:
    """The caches and the weights of one model on a CPU."""

    def __init__(
        self, config: MemoryConfig, model: object, caches: Sequence[tuple[Tensor, ...]]
    ) -> None:
        self._config = config
        self._model = model
        self._caches = caches
        self._released: set[str] = set()
        self._pieces: list[Piece] = []
        self._backup: IO[bytes] | None = None
        self.lacks_weights = False
        """Whether the weights' memory is there, but empty."""

    @property
    def has_released_weights(self) -> bool:
        return "weights" in self._released

    @property
    def why_not_ready(self) -> str | None:
        if self._released & {"kv_cache", "weights"}:
            return f"the memory of {', '.join(sorted(self._released))} is released"
        return "the weights were released and not yet filled again" if self.lacks_weights else None

    def filled(self) -> None:
        """The weights are there again."""
        self.lacks_weights = False

    def release(self, tags: Collection[str]) -> str:
        """Raises InvalidRequest, and nothing has changed, for a tag that is unknown or released."""
        if not self._config.enable_memory_saver:
            raise InvalidRequest(
                "this server was started without --enable-memory-saver, which lets its memory be "
                "released"
            )
        asked = _known(tags)
        if twice := asked & self._released:
            raise InvalidRequest(f"the memory of {', '.join(sorted(twice))} is released already")
        num_bytes = 0
        if "weights" in asked:
            self._pieces = self._weight_pieces()
            if self._config.enable_weights_cpu_backup:
                self._backup = _copied(self._pieces)
            num_bytes += _give_back(self._pieces)
        if "kv_cache" in asked:
            tensors = [tensor for layer in self._caches for tensor in layer]
            num_bytes += _give_back(_pieces(tensors))
        self._released |= asked
        return f"{num_bytes} bytes of {', '.join(sorted(asked))} were released"

    def resume(self, tags: Collection[str]) -> str:
        asked = _known(tags)
        if lacking := asked - self._released:
            raise InvalidRequest(f"the memory of {', '.join(sorted(lacking))} is not released")
        if "weights" in asked:
            if self._backup is None:
                self.lacks_weights = True
            else:
                _read_back(self._backup, self._pieces)
                self._backup.close()
                self._backup = None
        self._released -= asked
        return f"the memory of {', '.join(sorted(asked))} is there again"

    def _weight_pieces(self) -> list[Piece]:
        """All tensors of the model if there will be a copy; else those that are filled again."""
        everything = self._config.enable_weights_cpu_backup
        found = _tensors_in(self._model)
        return _pieces([tensor for tensor, is_filled in found if is_filled or everything])


def _known(tags: Collection[str]) -> set[str]:
    asked = set(tags or MEMORY_TAGS)
    if unknown := asked - set(MEMORY_TAGS):
        raise InvalidRequest(
            f"tags has {', '.join(sorted(unknown))[:200]} but may have {', '.join(MEMORY_TAGS)}"
        )
    return asked


def _pieces(tensors: Sequence[Tensor]) -> list[Piece]:
    """The whole system pages in the memory of these tensors, each once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    found: list[Piece] = []
    for address, num_bytes in storages.items():
        first = -(-address // _PAGE_BYTES) * _PAGE_BYTES
        end = (address + num_bytes) // _PAGE_BYTES * _PAGE_BYTES
        if end - first >= LEAST_BYTES:
            found.append((first, end - first))
    return found


def _tensors_in(model: object) -> Iterator[tuple[Tensor, bool]]:
    """All tensors that a model's own objects hold, and whether a checkpoint fills them."""
    stack: list[tuple[Any, bool]] = [(model, False)]
    seen: set[int] = set()
    while stack:
        value, is_filled = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.device.type == "cpu" and value.layout == torch.strided:
                yield value, is_filled
        elif isinstance(value, dict):
            stack += [(one, is_filled) for one in value.values()]
        elif isinstance(value, list | tuple):
            stack += [(one, is_filled) for one in value]
        elif type(value).__module__ in _FILLED_AGAIN:
            stack += [(one, True) for one in _attributes(value)]
        elif type(value).__module__.startswith(("sapwood.layers", "sapwood.models")):
            stack += [(one, False) for one in _attributes(value)]


def _attributes(value: object) -> Iterator[Any]:
    yield from getattr(value, "__dict__", {}).values()
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            yield getattr(value, name, None)


def _give_back(pieces: Sequence[Piece]) -> int:
    """Returns the bytes."""
    libc = ctypes.CDLL(None, use_errno=True)
    for address, num_bytes in pieces:
        done = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), _MADV_DONTNEED)
        if done != 0:
            raise OSError(ctypes.get_errno(), "madvise")
    return sum(num_bytes for _, num_bytes in pieces)


def _copied(pieces: Sequence[Piece]) -> IO[bytes]:
    file = tempfile.TemporaryFile(prefix="sapwood-weights-")  # noqa: SIM115 - read back later
    for piece in pieces:
        file.write(_view(piece))
    file.flush()
    return file


def _read_back(file: IO[bytes], pieces: Sequence[Piece]) -> None:
    file.seek(0)
    for piece in pieces:
        view = _view(piece)
        while len(view):
            count = file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise OSError("the copy of the weights is shorter than it was")
            view = view[count:]


def _view(piece: Piece) -> memoryview:
    address, num_bytes = piece
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")
