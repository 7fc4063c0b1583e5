from __future__ import annotations

from typing import Any

import pytest

from sapwood.base.errors import ConfigError
from sapwood.models.encoder.config import EncoderConfig
from sapwood.models.registry import encoder_class

BERT: dict[str, Any] = {
    "architectures": ["BertModel"],
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}


def test_what_bert_says() -> None:
    config = EncoderConfig.from_hf(BERT, max_tokens=32)
    assert (config.head_dim, config.num_kv_heads) == (8, 6)
    assert (config.num_positions, config.first_position, config.context_length) == (64, 0, 32)
    assert config.for_context(64).context_length == 64
    assert config.num_parameters == 2 * (4 * 48**2 + 2 * 48 * 96) + (100 + 64 + 2) * 48


def test_roberta_keeps_positions_for_padding() -> None:
    config = encoder_class("RobertaModel").read(
        BERT | {"architectures": ["RobertaModel"], "pad_token_id": 1}
    )
    assert (config.num_positions, config.first_position) == (62, 2)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"hidden_act": "mish"}, "activation 'mish'"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' positions"),
        ({"is_decoder": True}, "a decoder of an encoder"),
        ({"quantization_config": {"quant_method": "x"}}, "quantised"),
        ({"num_attention_heads": 5}, "not a multiple"),
        ({"vocab_size": None}, "integer 'vocab_size'"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EncoderConfig.from_hf(BERT | fields)


def test_a_context_beyond_the_positions() -> None:
    with pytest.raises(ConfigError, match="positions reach 64"):
        EncoderConfig.from_hf(BERT).for_context(65)
