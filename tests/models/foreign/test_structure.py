"""Which models transformers can compute over paged attention; the others are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sapwood.base.errors import ConfigError
from sapwood.models.foreign.structure import ForeignConfig, read_foreign
from tests.models.lm.cases import longrope
from tests.models.lm.peer import SIZES

ENCODER_DECODER = {"d_model": 48, "encoder_layers": 2, "decoder_layers": 2}


def read(directory: Path, model_type: str, architecture: str, **fields: Any) -> ForeignConfig:
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **(SIZES | fields)).to_dict()
    return read_json(directory, config | {"architectures": [architecture]})


def read_json(directory: Path, config: dict[str, Any], **options: Any) -> ForeignConfig:
    (directory / "config.json").write_text(json.dumps(config))
    return read_foreign(directory, config, **{"trust_remote_code": False, **options})


@pytest.mark.parametrize(
    ("model_type", "architecture", "fields", "reason"),
    [
        ("bart", "BartForCausalLM", ENCODER_DECODER, "an encoder with a decoder"),
        ("mamba", "MambaForCausalLM", {}, "keep states|do not call"),
        ("recurrent_gemma", "RecurrentGemmaForCausalLM", {}, "keep states of their own kind"),
        ("bloom", "BloomForCausalLM", {}, "do not call transformers' attention interface"),
        ("lfm2", "Lfm2ForCausalLM", {"full_attn_idxs": [1]}, "layers of the kind conv"),
        ("minimax", "MiniMaxForCausalLM", {}, "layers of the kind linear_attention"),
        ("bert", "BertLMHeadModel", {}, "attend to later ones"),
        ("diffllama", "DiffLlamaForCausalLM", {}, "calls attention more than once"),
        ("llama4_text", "Llama4ForCausalLM", {"head_dim": 8}, "the kind chunked_attention"),
        ("gemma3", "Gemma3ForConditionalGeneration", {}, "takes more than text"),
        ("qwen2", "ElizaForCausalLM", {}, "no language model of that name and of the model_type"),
        ("qwen2", "Qwen3ForCausalLM", {}, "of the model_type 'qwen2'"),
    ],
)
def test_others_are_refused(
    tmp_path: Path, model_type: str, architecture: str, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        read(tmp_path, model_type, architecture, **fields)
    assert f"transformers cannot compute {architecture}" in caught.value.message
    assert "sapwood models" in caught.value.message


def test_layers_that_keep_different_things_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"different (heads|windows)"):
        read(
            tmp_path,
            "mimo_v2_flash",
            "MiMoV2FlashForCausalLM",
            layer_types=["sliding_attention", "full_attention"],
            mlp_layer_types=["dense", "dense"],
        )


def test_the_context_ends_where_others_would_change_the_rotation(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"rope_parameters": longrope(4, 64), "pad_token_id": None}
    fields["original_max_position_embeddings"] = 64
    assert read(tmp_path, "phi3", "Phi3ForCausalLM", **fields).max_context_length == 64


def test_code_beside_the_checkpoint_needs_leave(tmp_path: Path) -> None:
    config = {"architectures": ["ElizaForCausalLM"], "model_type": "eliza"}
    config |= {"auto_map": {"AutoModelForCausalLM": "eliza.ElizaForCausalLM"}}
    with pytest.raises(ConfigError, match="only if --trust-remote-code asks for it"):
        read_json(tmp_path, config)
    with pytest.raises(ConfigError, match="could not be imported"):
        read_json(tmp_path, config, trust_remote_code=True)
