"""Reading ahead: the order, how far, and errors."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from sapwood.base.errors import WeightError
from sapwood.models.loader.reading import AHEAD_BYTES, Stored, empty, read_ahead, read_bytes


class Source:
    """Hands out names, and counts what is read and not yet dropped by its user."""

    def __init__(self) -> None:
        self.held = 0
        self.most_held = 0
        self.threads: set[str] = set()
        self._lock = threading.Lock()

    def stored(self, name: str, num_bytes: int, file_bytes: int = 1) -> Stored[str]:
        def read() -> str:
            with self._lock:
                self.threads.add(threading.current_thread().name)
                self.held += num_bytes
                self.most_held = max(self.most_held, self.held)
            time.sleep(0.002)
            return name

        return Stored(name=name, file_bytes=file_bytes, num_bytes=num_bytes, read=read)


def test_layers_come_one_after_the_other_and_what_is_outside_first() -> None:
    names = ["norm", "layers.10.b", "layers.2.b", "layers.10.a", "embed", "layers.2.a"]
    sizes = {"embed": 100}
    source = Source()
    pairs = list(read_ahead([source.stored(name, sizes.get(name, 1)) for name in names]))
    order = ["embed", "norm", "layers.2.b", "layers.2.a", "layers.10.b", "layers.10.a"]
    assert pairs == [(name, name) for name in order]


def test_several_threads_read_and_what_is_ahead_is_bounded() -> None:
    source, size, told = Source(), AHEAD_BYTES // 4, []
    stored = [source.stored(f"layers.{i}.w", size, file_bytes=7) for i in range(40)]
    for _ in read_ahead(stored, advance=told.append):
        time.sleep(0.001)
        source.held -= size
    assert told == [7] * 40
    assert len(source.threads) > 1
    assert source.most_held <= AHEAD_BYTES + size  # and the one in its user's hands


def test_a_tensor_larger_than_the_bound_is_read_alone() -> None:
    source, size = Source(), 3 * AHEAD_BYTES
    for _ in read_ahead([source.stored(f"layers.{i}.w", size) for i in range(4)]):
        source.held -= size
    assert source.most_held == size


def test_an_error_of_a_reader_reaches_its_user_and_ends_the_reading() -> None:
    def fail() -> str:
        raise WeightError("it is broken")

    source = Source()
    broken = Stored(name="layers.1.w", file_bytes=1, num_bytes=1, read=fail)
    stored = [source.stored("layers.0.w", 1), broken, source.stored("layers.2.w", 1)]
    weights = read_ahead(stored)
    assert next(weights)[0] == "layers.0.w"
    with pytest.raises(WeightError, match="it is broken"):
        next(weights)
    assert not any(name.name.startswith("weights") for name in threading.enumerate())


@pytest.mark.parametrize("size", [0, 10, 1 << 20])
def test_parts_of_files_are_read(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"head" + bytes(range(256)) * (size // 256 + 1))
    found = read_bytes(path, 4, size)
    assert bytes(found.tolist()) == path.read_bytes()[4 : 4 + size]
    with pytest.raises(WeightError, match=r"file ends before byte \d+, up to which a tensor lies"):
        read_bytes(path, 4, size + 257)
    with pytest.raises(WeightError, match="cannot be read"):
        read_bytes(tmp_path / "none", 0, size + 1)


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (400, 300)])
def test_tensors_have_memory_of_their_own(shape: tuple[int, ...]) -> None:
    tensor = empty(shape, torch.bfloat16).fill_(2.0)
    assert tensor.shape == shape
    assert tensor.dtype == torch.bfloat16
    assert tensor.eq(2.0).all()
