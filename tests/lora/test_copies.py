"""Copies of adapters beside the steps; on a CPU nothing is copied, but the order is the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from sapwood.kernels.low_rank import LowRank
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.adapters import AdapterContext, AdapterSite
from sapwood.lora.adapter import Adapter
from sapwood.lora.copies import AdapterCopies

CPU = torch.device("cpu")


@pytest.fixture
def copies() -> Iterator[AdapterCopies]:
    found = AdapterCopies(CPU)
    yield found
    found.close()


class Held:
    """An addition whose copy waits until it may go on, and may fail then."""

    num_bytes = 8

    def __init__(self, failure: Exception | None = None) -> None:
        self.may_go = threading.Event()
        self._failure = failure

    def to(self, device: torch.device) -> Held:
        self.may_go.wait()
        if self._failure is not None:
            raise self._failure
        return self


def adapter_of(addition: object) -> Adapter:
    site = AdapterSite(AdapterContext(), TorchKernels(), 4, 2)
    return Adapter(additions={site: addition}, num_bytes=8, rank=1, is_covered=True)  # type: ignore[dict-item]


def told(copies: AdapterCopies) -> list[str]:
    found: list[str] = []
    while not found:
        found = copies.arrived()
        time.sleep(0)
    return found


def test_an_adapter_is_told_of_once_it_is_there(copies: AdapterCopies) -> None:
    held = Held()
    copies.bring("a", adapter_of(held))
    assert copies.arrived() == []
    held.may_go.set()
    assert told(copies) == ["a"]
    assert copies.arrived() == []
    assert list(copies.take("a").values()) == [held]
    real = LowRank.of([(0, torch.ones(1, 4), torch.ones(2, 1))], torch.float32)
    copies.bring("a", adapter_of(real))
    assert told(copies) == ["a"]
    (copy,) = copies.take("a").values()
    assert copy.num_bytes == real.num_bytes
    copies.drop({})


def test_nobody_hears_of_an_adapter_that_was_removed(copies: AdapterCopies) -> None:
    held = Held()
    copies.bring("a", adapter_of(held))
    copies.forget("a")
    held.may_go.set()
    copies.bring("b", adapter_of(held))
    assert told(copies) == ["b"]


def test_a_copy_that_fails_is_an_error_of_the_engine(copies: AdapterCopies) -> None:
    held = Held(MemoryError("no room on the device"))
    held.may_go.set()
    copies.bring("a", adapter_of(held))
    with pytest.raises(MemoryError, match="no room"):
        told(copies)
