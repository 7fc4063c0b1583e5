"""Sums, gathers and exchanges of ranks on one machine's CPUs, in memory that they share.

gloo, which passes numbers through sockets, takes some hundreds of microseconds for any of them.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

CAPACITY = 128 << 10
"""Bytes that each rank exchanges at a time; more go in pieces, which stay in a core's cache."""
FOLDER = Path("/dev/shm")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""The compiled module's numbers for the dtypes that it adds up."""


class SharedMemory:
    """This rank's end of the exchange. `stop` may be called from any thread."""

    def __init__(self, file: int, rank: int, size: int) -> None:
        """file  descriptor of a file of `num_bytes(size)` bytes, all zero at first, which all ranks
        have open"""
        # Imported here: without a compiler sapwood has no such module, and gloo does all.
        from sapwood.kernels.cpu import _native

        self._memory = mmap.mmap(file, num_bytes(size))
        self._view = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._sums = _native.SharedSums(self._view.data_ptr(), rank, size, CAPACITY)
        self._size = size

    def can_add_up(self, x: Tensor) -> bool:
        return x.dtype in DTYPES and x.is_contiguous()

    def add_up(self, x: Tensor) -> None:
        """x = the sum of every rank's; RuntimeError after `stop`."""
        self._sums.add_up(DTYPES[x.dtype], x.data_ptr(), x.numel())

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's x [n, m] side by side, [n, size * m]; RuntimeError after `stop`."""
        x = x.contiguous()
        out = x.new_empty((x.shape[0], self._size * x.shape[1]))
        row_bytes = x.shape[1] * x.itemsize
        self._sums.gather(x.data_ptr(), out.data_ptr(), x.shape[0], row_bytes)
        return out

    def exchange(self, x: Tensor, out: Tensor, counts: Tensor) -> None:
        """As Group.all_to_all, into `out`; RuntimeError after `stop`."""
        x, sizes = x.contiguous(), (counts * (x.shape[1] * x.itemsize)).contiguous()
        self._sums.exchange(x.data_ptr(), out.data_ptr(), sizes.data_ptr())

    def stop(self) -> None:
        """A rank is gone: no rank waits any more."""
        self._sums.stop()


def num_bytes(size: int) -> int:
    """Bytes that so many ranks share."""
    from sapwood.kernels.cpu import _native

    return _native.SharedSums.bytes(size, CAPACITY)


def is_compiled() -> bool:
    """Whether this installation has the compiled module."""
    try:
        from sapwood.kernels.cpu import _native  # noqa: F401
    except ImportError:
        return False
    return True


def share_memory(store: Store, rank: int, size: int) -> SharedMemory | None:
    """Memory for the ranks of one machine; None if one of them cannot have it, on all ranks.

    store  of these ranks alone
    """
    path = ""
    if rank == 0 and is_compiled() and FOLDER.is_dir():
        descriptor, path = tempfile.mkstemp(prefix="sapwood-", dir=FOLDER)
        os.ftruncate(descriptor, num_bytes(size))
    if rank == 0:
        store.set("memory", path)
    else:
        path = store.get("memory").decode()
        can = bool(path) and is_compiled()
        descriptor = os.open(path, os.O_RDWR) if can else -1
        store.set(f"has-memory-{rank}", "yes" if can else "no")
    if not path:
        return None
    have = [store.get(f"has-memory-{other}") == b"yes" for other in range(1, size)]
    if rank == 0:
        Path(path).unlink()  # the memory stays until the last rank closes it
    if descriptor < 0:
        return None
    try:
        return SharedMemory(descriptor, rank, size) if all(have) else None
    finally:
        os.close(descriptor)
