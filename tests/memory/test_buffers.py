import torch

from sapwood.base.dtypes import KV_CACHE_8_BIT
from sapwood.kernels.kv_cache import KV_CACHE_DTYPES
from sapwood.memory.buffers import allocate_caches
from sapwood.schema.cache import CacheGroup, CacheKind, CacheTensor, keys_and_values


def allocate(device="cpu", dtype="bfloat16"):
    group = keys_and_values(range(3), num_kv_heads=2, head_dim=8, dtype=dtype)
    return allocate_caches([group], [5], page_size=4, device=torch.device(device))


def test_every_layer_has_zero_keys_and_values_of_its_own():
    caches = allocate()
    assert len(caches) == 3
    for number, cache in enumerate(cache for pair in caches for cache in pair):
        assert cache.shape == (5, 2, 4, 8)
        assert cache.dtype == torch.bfloat16
        assert not cache.any()
        cache.fill_(number + 1)
    for number, cache in enumerate(cache for pair in caches for cache in pair):
        assert (cache == number + 1).all()


def test_a_page_is_one_piece_over_all_layers():
    caches = [cache for pair in allocate() for cache in pair]
    page_bytes = 2 * 4 * 8 * 2
    starts = [cache[1].data_ptr() for cache in caches]
    assert [start - starts[0] for start in starts] == [page_bytes * i for i in range(6)]
    assert all(cache[1].is_contiguous() for cache in caches)
    assert caches[0][2].data_ptr() - caches[0][1].data_ptr() == 6 * page_bytes


def test_other_devices_have_the_same_layout():
    assert [cache.stride() for cache, _ in allocate("meta")] == [
        cache.stride() for cache, _ in allocate()
    ]


def test_in_8_bits_each_token_of_a_head_has_room_for_a_scale():
    for name in KV_CACHE_8_BIT:
        caches = [cache for pair in allocate(dtype=name) for cache in pair]
        dtype = KV_CACHE_DTYPES[name]
        assert all(cache.shape == (5, 2, 4, 8 + 2) and cache.dtype == dtype for cache in caches)
        assert not any(cache.view(torch.uint8).any() for cache in caches)
        page_bytes = 2 * 4 * (8 + 2)
        starts = [cache[1].data_ptr() for cache in caches]
        assert [start - starts[0] for start in starts] == [page_bytes * i for i in range(6)]


def test_every_group_has_tensors_of_its_own_pool_and_shape():
    groups = [
        keys_and_values([0, 3], num_kv_heads=2, head_dim=8, dtype="float32"),
        keys_and_values([1], num_kv_heads=1, head_dim=16, window=6, dtype="bfloat16"),
        CacheGroup(
            kind=CacheKind.STATE,
            layers=(2, 4),
            tensors={
                "conv": CacheTensor((3, 10), "bfloat16"),
                "state": CacheTensor((2, 4, 4), "float32"),
            },
        ),
    ]
    caches = allocate_caches(groups, [7, 3, 2], page_size=4, device=torch.device("cpu"))
    assert [[tuple(tensor.shape) for tensor in layer] for layer in caches] == [
        [(7, 2, 4, 8)] * 2,
        [(3, 1, 4, 16)] * 2,
        [(2, 3, 10), (2, 2, 4, 4)],
        [(7, 2, 4, 8)] * 2,
        [(2, 3, 10), (2, 2, 4, 4)],
    ]
    assert [layer[-1].dtype for layer in caches[:3]] == [
        torch.float32,
        torch.bfloat16,
        torch.float32,
    ]
    everything = [tensor for layer in caches for tensor in layer]
    for number, tensor in enumerate(everything):
        tensor.fill_(number + 1)
    for number, tensor in enumerate(everything):
        assert (tensor == number + 1).all()


def test_nothing_is_allocated_for_a_model_without_caches():
    assert allocate_caches([], [], page_size=4, device=torch.device("cpu")) == []


def test_layers_of_other_stages_get_no_memory():
    full = keys_and_values([0, 2], num_kv_heads=1, head_dim=8, dtype="float32")
    window = keys_and_values([1], num_kv_heads=1, head_dim=8, window=4, dtype="float32")
    caches = allocate_caches(
        [full, window], [5, 3], page_size=4, device=torch.device("cpu"), held=frozenset([2])
    )
    assert [len(cache) for cache in caches] == [0, 0, 2]
    assert caches[2][0].shape[0] == 5
