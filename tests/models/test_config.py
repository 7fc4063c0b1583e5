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
    assert stretched.for_context(stretched.rope.max_context_length).context_length == 4096
    assert stretched.context_length == 2048


MISTRAL = {"architectures": ["MistralForCausalLM"], "sliding_window": 512}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 512, "max_window_layers": 2}


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        (MISTRAL, (0, 1, 2, 3)),
        (MISTRAL | {"sliding_window": None}, ()),
        (QWEN | {"use_sliding_window": False}, ()),
        (QWEN | {"use_sliding_window": True}, (2, 3)),
        (QWEN | {"use_sliding_window": True, "max_window_layers": 4}, ()),
        (QWEN | {"use_sliding_window": True, "layer_types": ["full_attention"] * 4}, ()),
        (
            QWEN | {"layer_types": ["sliding_attention", "full_attention"] * 2},
            (0, 2),
        ),
        ({"sliding_window": 512}, ()),
    ],
)
def test_windowed_layers(fields: dict[str, Any], layers: tuple[int, ...]) -> None:
    config = read(num_hidden_layers=4, **fields)
    assert config.context_length == 2048
    assert config.windowed_layers == layers
    assert config.sliding_window == (512 if layers else None)
    assert tuple(i for i in range(4) if config.window_of(i) == 512) == layers


def test_layers_of_different_windows_are_different_groups() -> None:
    config = read(num_hidden_layers=4, **QWEN)
    assert [(group.kind, group.layers, group.window) for group in config.cache_groups] == [
        ("full", (0, 1), None),
        ("window", (2, 3), 512),
    ]


def test_a_window_that_holds_the_context_is_none() -> None:
    config = read(num_hidden_layers=4, **QWEN).for_context(512)
    assert not config.has_windows
    assert [(group.kind, group.layers) for group in config.cache_groups] == [("full", (0, 1, 2, 3))]


def test_layer_types_must_name_every_layer() -> None:
    with pytest.raises(ConfigError, match="each of its 4 layers"):
        read(num_hidden_layers=4, **QWEN, layer_types=["sliding_attention"])


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
