import torch

from sapwood.memory.buffers import allocate_kv_caches


def allocate(device="cpu", dtype=torch.bfloat16):
    return allocate_kv_caches(
        num_layers=3,
        num_pages=5,
        num_kv_heads=2,
        page_size=4,
        head_dim=8,
        dtype=dtype,
        device=torch.device(device),
    )


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
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
        caches = [cache for pair in allocate(dtype=dtype) for cache in pair]
        assert all(cache.shape == (5, 2, 4, 8 + 2) and cache.dtype == dtype for cache in caches)
        assert not any(cache.view(torch.uint8).any() for cache in caches)
        page_bytes = 2 * 4 * (8 + 2)
        starts = [cache[1].data_ptr() for cache in caches]
        assert [start - starts[0] for start in starts] == [page_bytes * i for i in range(6)]
