"""Text parts of models that also see, against transformers' whole models on text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from sapwood.base.errors import ConfigError
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.models.registry import read_decoder
from sapwood.models.text_part import TEXT_ARCHITECTURES, WRAPPERS, text_part
from sapwood.models.vision.registry import TOWERS
from tests.models.lm.cases import peer_of
from tests.models.lm.harness import Session, make_decoder
from tests.models.lm.peer import SIZES, random_text

VISION = {
    **dict.fromkeys(("hidden_size", "embed_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "spatial_merge_size"), 2),
    "intermediate_size": 16,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # In transformers these do not scale logits, unlike the text's own class and other engines.
    "AyaVisionForConditionalGeneration": ("aya_vision", "cohere2", {"logit_scale": 1.0}),
    "Cohere2VisionForConditionalGeneration": ("cohere2_vision", "cohere2", {"logit_scale": 1.0}),
    "Gemma3ForConditionalGeneration": ("gemma3", "gemma3_text", {"head_dim": 32}),
    "Idefics3ForConditionalGeneration": ("idefics3", "llama", {}),
    "InternVLForConditionalGeneration": ("internvl", "qwen2", {}),
    "Lfm2VlForConditionalGeneration": ("lfm2_vl", "lfm2", {}),
    "Llama4ForConditionalGeneration": (
        "llama4",
        "llama4_text",
        {"head_dim": 32, "attention_chunk_size": 16, "intermediate_size_mlp": 96}
        | {"num_local_experts": 4},
    ),
    "LlavaForConditionalGeneration": ("llava", "llama", {}),
    "LlavaNextForConditionalGeneration": ("llava_next", "mistral", {}),
    "LlavaOnevisionForConditionalGeneration": ("llava_onevision", "qwen2", {}),
    "Mistral3ForConditionalGeneration": ("mistral3", "ministral3", {"head_dim": 8}),
    "Qwen2_5_VLForConditionalGeneration": (
        "qwen2_5_vl",
        "qwen2_5_vl_text",
        {"rope_parameters": SECTIONS},
    ),
    "Qwen2VLForConditionalGeneration": (
        "qwen2_vl",
        "qwen2_vl_text",
        {"rope_parameters": SECTIONS},
    ),
    "Qwen3VLForConditionalGeneration": (
        "qwen3_vl",
        "qwen3_vl_text",
        {"rope_parameters": SECTIONS},
    ),
    "SmolVLMForConditionalGeneration": ("smolvlm", "llama", {}),
}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def saved(
    directory: Path, model_type: str, text_type: str, fields: dict[str, Any]
) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    """(transformers' model, tensors of its file, its config.json)"""
    text = {**SIZES, "pad_token_id": 0, "model_type": text_type, **fields}
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=dict(VISION))
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        parameter.data = 1.0 + 0.2 * noise if "norm" in name else noise * scale
    model.tie_weights()
    model.save_pretrained(directory)
    hf = json.loads((directory / "config.json").read_text("utf-8"))
    return model, load_file(directory / "model.safetensors"), hf


RENAMED = {
    "Gemma3nForConditionalGeneration": "gemma3n",
    "Gemma4ForConditionalGeneration": "gemma4",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe",
}
"""Whose other parts need more than transformers; the text part is one of tests/models/lm/cases."""


def test_every_wrapper_is_compared() -> None:
    # The others are compared whole, tower and all, in tests/app/test_sight.py.
    others = WRAPPERS.keys() - {*CASES, *RENAMED}
    assert others <= {*TOWERS.names()}
    assert {*CASES, *RENAMED} <= WRAPPERS.keys()
    assert {kind for kind, _ in WRAPPERS.values()} <= TEXT_ARCHITECTURES.keys()


@pytest.mark.parametrize("architecture", CASES)
def test_logits_of_text_are_those_of_the_whole_model(architecture: str, tmp_path: Path) -> None:
    model, weights, hf = saved(tmp_path, *CASES[architecture])
    assert hf["architectures"] == [architecture]
    text = random_text(60)
    got = Session(make_decoder(hf, weights, TorchKernels())).step({"a": text})["a"]
    # transformers 5.24's Llama 4 asks its text part for outputs of pictures, which that lacks.
    peer = model.language_model if architecture.startswith("Llama4") else model
    want = peer(torch.tensor([text])).logits[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", RENAMED)
def test_logits_are_those_of_the_text_part(architecture: str) -> None:
    peer, text = peer_of(RENAMED[architecture]), random_text(40)
    hf = {
        "architectures": [architecture],
        "text_config": peer.hf_config,
        "vision_config": {},
        "audio_config": {},
    }
    weights = {
        name.replace("model.", "model.language_model.", 1): one
        for name, one in peer.weights.items()
    }
    weights["model.embed_vision.embedding.weight"] = torch.ones(2, 2)
    got = Session(make_decoder(hf, weights, TorchKernels())).step({"a": text})["a"]
    torch.testing.assert_close(got, peer.logits(text), atol=1e-4, rtol=0)


def test_fields_of_the_text_part_may_lie_beside_others() -> None:
    """As in the first files of Qwen2-VL, whose rotation has another name too."""
    hf = {
        **SIZES,
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vision_config": {"depth": 3},
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    config = read_decoder(hf)
    assert (config.architecture, config.num_layers) == ("Qwen2ForCausalLM", 2)
    assert config.rope.scaling is None


def test_a_text_part_of_another_kind_is_refused() -> None:
    hf = {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"model_type": "t5"},
    }
    with pytest.raises(ConfigError, match="of the kind 't5'"):
        text_part(hf)
    with pytest.raises(ConfigError, match="an object as 'text_config'"):
        text_part(hf | {"text_config": 3})
