from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sapwood.kernels import transfer

CPU = torch.device("cpu")
ANY_ARRAY = st.sampled_from([np.int64, np.int32, np.float32, np.uint8]).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=1, max_dims=3, min_side=0))
)


@given(st.lists(ANY_ARRAY, max_size=6))
def test_what_is_packed_is_unpacked(given_arrays: list[np.ndarray]) -> None:
    packed = torch.zeros(transfer.packed_bytes(given_arrays), dtype=torch.uint8)
    transfer.pack(given_arrays, packed.numpy())
    for array, tensor in zip(given_arrays, transfer.unpack(packed, given_arrays), strict=True):
        assert tensor.shape == array.shape
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_arrays_that_lie_scattered_are_packed_too() -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4).T
    packed = torch.zeros(transfer.packed_bytes([array]), dtype=torch.uint8)
    transfer.pack([array], packed.numpy())
    np.testing.assert_array_equal(transfer.unpack(packed, [array])[0].numpy(), array)


def test_a_cpu_is_where_the_host_is() -> None:
    array = np.arange(3)
    [there] = transfer.upload([array], CPU)
    assert there.data_ptr() == array.ctypes.data
    assert transfer.download(there).wait() is not None
    assert not transfer.runs_ahead(CPU)
    transfer.synchronize(CPU)


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and this machine has none")
    return torch.device("cuda")


def test_on_a_gpu_copies_wait_for_nothing(device: torch.device) -> None:
    values = np.arange(1000, dtype=np.float32)
    there, counts = transfer.upload([values, np.arange(7)], device)
    back = transfer.download(there * 2)
    np.testing.assert_array_equal(back.wait().numpy(), values * 2)
    np.testing.assert_array_equal(counts.cpu().numpy(), np.arange(7))
