from __future__ import annotations

from itertools import pairwise

import torch

from sapwood.kernels.large_pages import CHUNK_BYTES, WeightMemory


def test_tensors_are_whole_apart_and_aligned() -> None:
    memory = WeightMemory()
    shapes = [(3, 5), (7,), (1024, 1024), (64, 33)]
    tensors = [memory.empty(shape, torch.bfloat16) for shape in shapes]
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(i)
    assert all((tensor == i).all() for i, tensor in enumerate(tensors))


def test_a_new_chunk_is_begun_when_one_is_full_and_large_tensors_have_their_own() -> None:
    memory = WeightMemory()
    size = CHUNK_BYTES // 4
    small = [memory.empty((size,), torch.uint8) for _ in range(5)]
    large = memory.empty((size + 1,), torch.uint8)
    after = memory.empty((8,), torch.uint8)
    addresses = [tensor.data_ptr() for tensor in small]
    assert [b - a for a, b in pairwise(addresses[:4])] == [size] * 3
    assert abs(addresses[4] - addresses[3]) >= CHUNK_BYTES
    assert after.data_ptr() == addresses[4] + size
    assert large.data_ptr() % (2 << 20) == addresses[0] % (2 << 20) == addresses[4] % (2 << 20) == 0
    large.fill_(1)
