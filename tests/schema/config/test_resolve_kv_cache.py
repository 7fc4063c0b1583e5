from dataclasses import replace

import pytest

from sapwood.base.errors import ConfigError
from sapwood.schema.cache import keys_and_values
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.memory import KV_CACHE_8_BIT, MemoryConfig
from sapwood.schema.config.model import ModelConfig
from sapwood.schema.config.resolve import resolve
from tests.schema.config.test_resolve import CPU, ENCODER, MODEL, reasons

LAYERS, HEADS, HEAD_DIM = 30, 3, 64
DECODER = replace(
    MODEL, cache=(keys_and_values(range(LAYERS), num_kv_heads=HEADS, head_dim=HEAD_DIM),)
)


def pool(kv_cache_dtype: str, **memory: object) -> tuple[MemoryConfig, dict[str, str]]:
    asked = EngineConfig(memory=MemoryConfig(kv_cache_dtype=kv_cache_dtype, **memory))
    config, decisions = resolve(asked, CPU, DECODER)
    return config.memory, reasons(decisions)


def test_the_default_is_the_data_type_of_the_activations():
    for dtype in ("float32", "bfloat16", "float16"):
        asked = EngineConfig(model=ModelConfig(dtype=dtype))
        config, decisions = resolve(asked, CPU, DECODER)
        assert config.memory.kv_cache_dtype == dtype
        assert reasons(decisions)["kv_cache_dtype"] == "the same as --dtype"


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_8_BIT)
def test_the_same_memory_holds_twice_the_tokens_but_for_their_scales(kv_cache_dtype):
    dense, _ = pool("bfloat16", mem_fraction_static=0.2)
    small, why = pool(kv_cache_dtype, mem_fraction_static=0.2)
    assert small.kv_cache_dtype == kv_cache_dtype
    wanted = 2 * HEAD_DIM / (HEAD_DIM + 2)
    assert small.max_total_tokens / dense.max_total_tokens == pytest.approx(wanted, rel=1e-3)
    assert why["kv_cache_dtype"] == (
        "asked for; a token takes 11,880 bytes instead of 23,040 in bfloat16: 1.94 times the "
        "tokens in the same memory"
    )


def test_whether_a_pool_fits_is_told_from_its_real_bytes():
    tokens = CPU.memory_bytes // (2 * LAYERS * HEADS * HEAD_DIM * 2) * 3 // 2
    assert pool("int8", max_total_tokens=tokens)[0].max_total_tokens == tokens - tokens % 16
    with pytest.raises(ConfigError, match="GiB of KV"):
        pool("bfloat16", max_total_tokens=tokens)


def test_a_dense_cache_of_another_data_type_is_refused():
    asked = EngineConfig(
        model=ModelConfig(dtype="float32"), memory=MemoryConfig(kv_cache_dtype="bfloat16")
    )
    with pytest.raises(ConfigError, match="data type of the activations, float32; leave"):
        resolve(asked, CPU, DECODER)


def test_an_encoder_has_no_cache_to_store_so():
    asked = EngineConfig(memory=MemoryConfig(kv_cache_dtype="int8"))
    with pytest.raises(ConfigError, match="encoder is an encoder, which keeps no keys"):
        resolve(asked, CPU, ENCODER)
