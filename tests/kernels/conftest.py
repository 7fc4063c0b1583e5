"""Small matrices: one thread is as fast as two, and leaves the other core to other tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.torch_ops import TorchKernels

IMPLEMENTATIONS = ["torch", *CpuKernels.usable_isas()]
"""Names for `make_kernels`; Triton's are tested in a folder of their own."""


def make_kernels(name: str) -> Kernels:
    return TorchKernels() if name == "torch" else CpuKernels(isa=name, num_threads=2)


@pytest.fixture(params=IMPLEMENTATIONS)
def any_kernels(request: pytest.FixtureRequest) -> Kernels:
    """To be compared with the reference."""
    return make_kernels(request.param)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)
