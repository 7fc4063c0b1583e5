"""DecoderConfig from config.json, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from sapwood.base.errors import ConfigError
from sapwood.models.config import FULL, SLIDING, DecoderConfig, ExpertsConfig
from sapwood.models.registry import read_decoder

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 2048,
}


def read(**fields: Any) -> DecoderConfig:
    return read_decoder(BASE | fields)


def test_what_is_missing_has_the_usual_meaning() -> None:
    config = read()
    assert (config.num_kv_heads, config.head_dim, config.context_length) == (6, 8, 2048)
    flags = (config.tie_word_embeddings, config.attention_bias, config.mlp_bias)
    assert flags == (False, False, False)
    assert read(architectures=["Qwen3ForCausalLM"]).head_dim == 128


def test_what_is_given_is_read() -> None:
    config = read(
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
    )
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (2, 32, 1e-5)
    assert config.tie_word_embeddings
    assert config.attention_bias
    assert config.mlp_bias


def test_context_length_within_the_positions() -> None:
    assert read().for_context(64).context_length == 64
    with pytest.raises(ConfigError, match="positions reach 2048; start with --context-length 2048"):
        read().for_context(2049)
    stretched = read(rope_scaling={"type": "dynamic", "factor": 2.0})
    assert stretched.for_context(stretched.max_context_length).context_length == 4096
    assert stretched.context_length == 2048


MISTRAL = {"architectures": ["MistralForCausalLM"], "sliding_window": 512}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 512, "max_window_layers": 2}


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        (MISTRAL, [512] * 4),
        (MISTRAL | {"sliding_window": None}, [None] * 4),
        (MISTRAL | {"sliding_window": 2048}, [None] * 4),  # as long as the context
        (QWEN, [None] * 4),
        (QWEN | {"use_sliding_window": False}, [None] * 4),
        (QWEN | {"use_sliding_window": True}, [None, None, 512, 512]),
        (QWEN | {"use_sliding_window": True, "max_window_layers": 4}, [None] * 4),
        (QWEN | {"use_sliding_window": True, "layer_types": [FULL] * 4}, [None] * 4),
        (
            QWEN | {"use_sliding_window": True, "layer_types": [SLIDING, FULL, SLIDING, FULL]},
            [512, None, 512, None],
        ),
        ({"sliding_window": 512}, [None] * 4),
    ],
)
def test_each_layer_has_its_window(fields: dict[str, Any], windows: list[int | None]) -> None:
    config = read(**fields)
    assert [config.window_of(layer) for layer in range(4)] == windows
    assert config.context_length == 2048


def test_a_window_that_holds_the_whole_context_is_none() -> None:
    assert read(**MISTRAL).for_context(512).window_of(0) is None
    assert read(**MISTRAL).for_context(513).window_of(0) == 512


def test_layers_of_different_windows_are_different_groups() -> None:
    config = read(**QWEN, use_sliding_window=True)
    assert [(group.kind, group.layers, group.window) for group in config.cache_groups] == [
        ("full", (0, 1), None),
        ("window", (2, 3), 512),
    ]
    config = config.for_context(512)
    assert not config.has_windows
    assert [(group.kind, group.layers) for group in config.cache_groups] == [("full", (0, 1, 2, 3))]


def test_parameters_of_experts_are_counted() -> None:
    dense = read()
    experts = ExpertsConfig(num_experts=8, num_per_token=2, intermediate_size=64)
    mixed = replace(dense, experts=experts)
    added = 7 * 3 * 48 * 64 + 8 * 48  # seven more of each layer's, and the router
    assert mixed.num_parameters == dense.num_parameters + 4 * added
    with pytest.raises(ConfigError, match="8 experts of size 64, of which 9"):
        ExpertsConfig(num_experts=8, num_per_token=9, intermediate_size=64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": []}, "must name one architecture"),
        ({"vocab_size": None}, "integer 'vocab_size', got None"),
        ({"max_position_embeddings": None}, "integer 'max_position_embeddings', got None"),
        ({"hidden_size": "48"}, "integer 'hidden_size', got '48'"),
        ({"num_hidden_layers": 0}, "num_layers is 0 but must be >= 1"),
        ({"num_attention_heads": 0}, "num_heads is 0"),
        ({"num_key_value_heads": 4}, "6 attention heads, which is not a multiple of its 4"),
        ({"num_attention_heads": 7}, "hidden_size 48 is not a multiple of num_attention_heads 7"),
        ({"head_dim": 7}, "must pair up"),
        ({"hidden_act": "mish"}, "activation 'mish'; implemented: silu, swish, gelu"),
        (MISTRAL | {"layer_types": [SLIDING]}, "for each of its 4 layers"),
        (MISTRAL | {"layer_types": ["chunked_attention"] * 4}, "full_attention or sliding_att"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window is 0 but must be >= 1"),
        ({"architectures": ["ElizaForCausalLM"]}, "unknown architecture 'ElizaForCausalLM'"),
        ({"architectures": ["BertModel"]}, "BertModel is an encoder, which generates nothing"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**fields)


def test_reading_a_config_needs_no_torch() -> None:
    code = (
        "import sys, sapwood.models.config, sapwood.models.registry; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
