"""Where the Triton kernels are tested: natively where there is a GPU, else by the interpreter.

The interpreter is chosen in tests/conftest.py, before anything imports triton."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (extra: gpu)")


@pytest.fixture(scope="session")
def device() -> torch.device:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("there is no GPU that torch can use, and TRITON_INTERPRET=1 is not set")
