"""Which model is taken where nobody names one."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from sapwood.base.errors import ModelSourceError
from sapwood.store.fetch import ModelStore
from sapwood.store.progress import Progress

DEFAULT = "default"
"""The name that stands for the choice."""
PREFERRED, SMALL = "qwen2.5-coder-0.5b", "smollm2-135m"
"""Good answers to everyday questions; a fifth of its size, for where it cannot be had."""
MEMORY_BYTES = 3 << 30
"""What the preferred model wants of free memory: weights, a useful KV cache, two processes."""
DISK_BYTES = 3 << 29
"""What it wants of free disk while it is fetched: its parts, and the file joined of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The name of a catalogue entry, and why it was chosen."""

    name: str
    why: str


def choose_default(store: ModelStore, *, offline: bool, progress: Progress) -> Choice:
    """The preferred model if memory and disk allow, fetched unless the cache has it; else the small
    one, which is fetched by whoever uses it."""
    memory = psutil.virtual_memory().available
    if memory < MEMORY_BYTES:
        return _small(f"{_gib(memory)} of memory are free; {PREFERRED} wants {_gib(MEMORY_BYTES)}")
    if not _is_cached(store, progress):
        disk = _free_disk(store.home)
        if disk < DISK_BYTES:
            return _small(f"{_gib(disk)} of disk are free; {PREFERRED} wants {_gib(DISK_BYTES)}")
        try:
            store.locate(PREFERRED, offline=offline, progress=progress)
        except ModelSourceError as error:
            return _small(error.message)
    return Choice(name=PREFERRED, why="nobody named a model")


def _is_cached(store: ModelStore, progress: Progress) -> bool:
    try:
        store.locate(PREFERRED, offline=True, progress=progress)
    except ModelSourceError:
        return False
    return True


def _small(why: str) -> Choice:
    return Choice(name=SMALL, why=why)


def _free_disk(home: Path) -> int:
    there = next(path for path in (home, *home.parents) if path.exists())
    return shutil.disk_usage(there).free


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"
