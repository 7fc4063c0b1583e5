"""What happens to checkpoints that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.kernels.reference import ReferenceKernels
from sapwood.layers.build import Build
from sapwood.models.lm.decoder import Decoder
from sapwood.models.loader.assign import load_weights
from sapwood.models.registry import read_decoder


def make_model(*, tied: bool = False, num_layers: int = 2) -> Decoder:
    config = read_decoder(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 10,
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 16,
            "tie_word_embeddings": tied,
        }
    )
    build = Build(kernels=ReferenceKernels(), device=torch.device("cpu"), dtype=torch.float32)
    return Decoder.of(config, build)


def full(model: Decoder) -> dict[str, Tensor]:
    return {name: torch.randn(target.shape) for name, target in model.targets().items()}


def test_names_and_shapes_are_those_of_the_checkpoint() -> None:
    shapes = {name: target.shape for name, target in make_model(num_layers=1).targets().items()}
    layer = "model.layers.0"
    assert shapes == {
        "model.embed_tokens.weight": (10, 8),
        f"{layer}.input_layernorm.weight": (8,),
        f"{layer}.self_attn.q_proj.weight": (8, 8),
        f"{layer}.self_attn.k_proj.weight": (4, 8),
        f"{layer}.self_attn.v_proj.weight": (4, 8),
        f"{layer}.self_attn.o_proj.weight": (8, 8),
        f"{layer}.post_attention_layernorm.weight": (8,),
        f"{layer}.mlp.gate_proj.weight": (12, 8),
        f"{layer}.mlp.up_proj.weight": (12, 8),
        f"{layer}.mlp.down_proj.weight": (8, 12),
        "model.norm.weight": (8,),
        "lm_head.weight": (10, 8),
    }


def test_the_report_counts_what_was_loaded() -> None:
    model = make_model(tied=True)
    weights = full(model)
    num_bytes = sum(tensor.numel() * 2 for tensor in weights.values())
    halves = {name: tensor.bfloat16() for name, tensor in weights.items()}
    extra = {
        "lm_head.weight": torch.ones(10, 8),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    report = load_weights(model, (halves | extra).items())
    assert (report.num_tensors, report.num_bytes) == (len(weights), num_bytes)
    assert report.ignored == tuple(extra)


def test_every_mistake_is_named() -> None:
    model = make_model()
    weights = full(model)
    del weights["model.layers.0.mlp.up_proj.weight"], weights["lm_head.weight"]
    weights["model.layers.2.mlp.up_proj.weight"] = torch.ones(12, 8)
    weights["model.layers.1.self_attn.q_proj.weight"] = torch.ones(4, 8)
    listed = [*weights.items(), ("model.norm.weight", torch.ones(8))]
    with pytest.raises(WeightError) as caught:
        load_weights(model, listed)
    message = str(caught.value)
    assert "2 missing: model.layers.0.mlp.up_proj.weight, lm_head.weight" in message
    assert "1 unexpected: model.layers.2.mlp.up_proj.weight" in message
    assert "1 given twice: model.norm.weight" in message
    assert "model.layers.1.self_attn.q_proj.weight (is [4, 8], must be [8, 8])" in message


def test_an_untied_model_needs_its_output_layer_and_a_tied_one_does_not() -> None:
    weights = full(make_model(tied=True))
    load_weights(make_model(tied=True), weights.items())
    with pytest.raises(WeightError, match=r"1 missing: lm_head\.weight"):
        load_weights(make_model(tied=False), weights.items())


def test_a_long_list_is_cut_and_counted() -> None:
    model = make_model(num_layers=3)
    with pytest.raises(WeightError, match=r"30 missing: model\.embed_tokens.* and 10 more"):
        load_weights(model, [])
