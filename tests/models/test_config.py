"""DecoderConfig from config.json, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from sapwood.base.errors import ConfigError
from sapwood.models.config import DecoderConfig

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
    return DecoderConfig.from_hf(BASE | fields)


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
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (2, 32, 1e-5)
    assert config.tie_word_embeddings
    assert config.attention_bias
    assert config.mlp_bias


def test_context_length_within_the_positions() -> None:
    assert read().for_context(64).context_length == 64
    with pytest.raises(ConfigError, match="positions reach 2048; start with --context-length 2048"):
        read().for_context(2049)
    stretched = read(rope_scaling={"type": "dynamic", "factor": 2.0})
    assert stretched.for_context(stretched.max_context_length).context_length == 4096
    assert stretched.context_length == stretched.default_context_length == 2048


MISTRAL = {"architectures": ["MistralForCausalLM"], "sliding_window": 512}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 512, "max_window_layers": 2}


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        (MISTRAL, 512),
        (MISTRAL | {"sliding_window": None}, None),
        (QWEN | {"use_sliding_window": False}, None),
        (QWEN | {"use_sliding_window": True}, 512),
        (QWEN | {"use_sliding_window": True, "max_window_layers": 4}, None),
        (QWEN | {"use_sliding_window": True, "layer_types": ["full_attention"] * 4}, None),
        (QWEN | {"use_sliding_window": True, "layer_types": ["sliding_attention"]}, 512),
        ({"sliding_window": 512}, None),
    ],
)
def test_sliding_window(fields: dict[str, Any], window: int | None) -> None:
    config = read(**fields)
    assert config.sliding_window == window
    assert config.context_length == config.default_context_length == (window or 2048)


def test_a_context_longer_than_the_window_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sliding window of 512.*--context-length 512 or less"):
        read(**MISTRAL).for_context(513)
    assert read(**MISTRAL).max_context_length == 512


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
        ({"hidden_act": "gelu"}, "activation 'gelu'; implemented: 'silu'"),
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
