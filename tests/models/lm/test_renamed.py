"""Architectures that transformers does not have, against one of its models with the same
mathematics, whose weights and fields are renamed as their checkpoints have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.models.registry import read_decoder
from tests.models.lm.checks import CHECKS
from tests.models.lm.harness import Session, make_decoder
from tests.models.lm.peer import Peer, make_peer, random_text
from tests.models.lm.test_architectures import native_or_skip

Weights = dict[str, Tensor]
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
EQUAL_HEADS = {"num_key_value_heads": 6}


@dataclass(frozen=True)
class Case:
    """`peer`: (model_type, its fields) of the model in transformers; `fields`: config.json of the
    renamed one; `names`: parts of names that are replaced, in this order; `fused`: changes the
    weights after that."""

    peer: tuple[str, dict[str, Any]]
    fields: dict[str, Any]
    names: Mapping[str, str]
    fused: Callable[[Weights], object] = lambda _: None


def fuse(
    weights: Weights, parts: tuple[str, ...], name: str, *, per_group: int | None = None
) -> None:
    """Replace layers `parts` by one layer `name`; with `per_group`, heads of 8 entries of which so
    many queries, a key and a value lie together."""
    for key in [key for key in weights if f".{parts[0]}." in key]:
        own = [weights.pop(key.replace(f".{parts[0]}.", f".{part}.")) for part in parts]
        if per_group is not None:
            own = [one.unflatten(0, (2, -1, 8)) for one in own]
            fused = torch.cat(own, dim=1).flatten(0, 2)
        else:
            fused = torch.cat(own)
        weights[key.replace(f".{parts[0]}.", f".{name}.")] = fused


def drop_shared_gate(weights: Weights) -> None:
    """Without the gate of shared experts. The one in the peer is zero, which halves them."""
    for key in [key for key in weights if "shared_expert_gate" in key]:
        weights[key.replace("_gate.weight", "s.down_proj.weight")] *= 0.5
        del weights[key]


QKV = ("q_proj", "k_proj", "v_proj")
SOFTMAX_MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 80,
    "norm_topk_prob": True,
    "qkv_bias": False,
}
MOE_SIZES = SIZES | {
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}
GROUPS = {
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}
BAILING_NAMES = {
    "embed_tokens": "word_embeddings",
    "self_attn": "attention",
    "o_proj": "dense",
}
GPT_NAMES = {
    "model.embed_tokens": "transformer.wte",
    "model.layers": "transformer.h",
    "model.norm": "transformer.ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
}
DECI_LAYERS = ((3, 16), (None, 8), (1, None), (2, 8))
"""Queries per key and value head, None without attention, and factor of the feed-forward's size,
None without one."""


def vary_layers(weights: Weights) -> None:
    """Make each layer what DECI_LAYERS says: the whole ones, with zeros and with equal heads, stay
    in the model of transformers, and only their parts are in the checkpoint."""
    for index, (per_group, factor) in enumerate(DECI_LAYERS):
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        if per_group is None:
            weights[f"{attention}.o_proj.weight"].zero_()
            drop(weights, (attention, f"{prefix}.input_layernorm"))
        else:
            for name in ("k_proj", "v_proj"):
                heads = weights[f"{attention}.{name}.weight"].view(
                    6 // per_group, per_group, -1, 48
                )
                heads[:, 1:] = heads[:, :1]
                weights[f"{attention}.{name}.weight"] = heads[:, 0].reshape(-1, 48)
        size = 0 if factor is None else 32 * factor
        weights[f"{mlp}.down_proj.weight"][:, size:] = 0.0
        weights[f"{mlp}.down_proj.weight"] = weights[f"{mlp}.down_proj.weight"][:, :size]
        for name in ("gate_proj", "up_proj"):
            weights[f"{mlp}.{name}.weight"] = weights[f"{mlp}.{name}.weight"][:size]
        if factor is None:
            drop(weights, (mlp, f"{prefix}.post_attention_layernorm"))


def drop(weights: Weights, prefixes: tuple[str, ...]) -> None:
    for name in [name for name in weights if name.startswith(prefixes)]:
        del weights[name]


def deci_block(per_group: int | None, factor: int | None) -> dict[str, Any]:
    attention = {"no_op": True} if per_group is None else {"n_heads_in_group": per_group}
    return {
        "attention": {"no_op": False, "n_heads_in_group": None, **attention},
        "ffn": {"no_op": factor is None, "ffn_mult": factor, "replace_with_linear": False},
    }


CASES: dict[str, Case] = {
    "DeciLMForCausalLM": Case(
        ("llama", {"num_hidden_layers": 4, "intermediate_size": 512, **EQUAL_HEADS}),
        {
            **SIZES,
            "num_hidden_layers": 4,
            "intermediate_size": None,
            "num_key_value_heads": None,
            "block_configs": [deci_block(*one) for one in DECI_LAYERS],
        },
        {},
        vary_layers,
    ),
    "TeleFLMForCausalLM": Case(
        (
            "granite",
            {
                "embedding_multiplier": 3.0,
                "residual_multiplier": 1.0,
                "logits_scaling": 1.25,
                "attention_multiplier": 8**-0.5,
            },
        ),
        {**SIZES, "use_mup": True, "input_mult": 3.0, "output_mult": 2, "mup_scale_factor": 2.5},
        {},
    ),
    "MiMoForCausalLM": Case(("qwen2", {}), SIZES, {}),
    "XverseForCausalLM": Case(("llama", {}), SIZES, {}),
    "InternLMForCausalLM": Case(
        ("llama", {"attention_bias": True, **EQUAL_HEADS}),
        {**SIZES, "bias": True} | EQUAL_HEADS,
        {},
    ),
    "InternLM2ForCausalLM": Case(
        ("llama", {}),
        {**SIZES, "bias": False},
        {
            "embed_tokens": "tok_embeddings",
            "lm_head": "output",
            "self_attn": "attention",
            "mlp": "feed_forward",
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm",
            "o_proj": "wo",
            "gate_proj": "w1",
            "up_proj": "w3",
            "down_proj": "w2",
        },
        lambda weights: fuse(weights, QKV, "wqkv", per_group=3),
    ),
    "InternLM3ForCausalLM": Case(
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        {**SIZES, "bias": True, "qkv_bias": True},
        {},
    ),
    "BaichuanForCausalLM": Case(
        ("llama", EQUAL_HEADS),
        SIZES | EQUAL_HEADS,
        {},
        lambda weights: fuse(weights, QKV, "W_pack"),
    ),
    "OrionForCausalLM": Case(
        (
            "stablelm",
            {"rope_parameters": {"partial_rotary_factor": 1.0, "rope_theta": 1e4}},
        ),
        {**SIZES, "rms_norm_eps": 1e-5},
        {},
    ),
    "ChatGLMModel": Case(
        (
            "glm",
            {"head_dim": 8, "attention_bias": True, "pad_token_id": None, "rms_norm_eps": 1e-5},
        ),
        {
            "padded_vocab_size": 131,
            "hidden_size": 48,
            "ffn_hidden_size": 80,
            "num_layers": 2,
            "num_attention_heads": 6,
            "kv_channels": 8,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "seq_length": 256,
            "add_qkv_bias": True,
            "add_bias_linear": False,
            "layernorm_epsilon": 1e-5,
        },
        {
            "model.embed_tokens": "transformer.embedding.word_embeddings",
            "model.layers": "transformer.encoder.layers",
            "model.norm": "transformer.encoder.final_layernorm",
            "lm_head": "transformer.output_layer",
            "self_attn": "self_attention",
            "o_proj": "dense",
            "gate_up_proj": "dense_h_to_4h",
            "down_proj": "dense_4h_to_h",
        },
        lambda weights: fuse(weights, QKV, "query_key_value"),
    ),
    "QWenLMHeadModel": Case(
        ("qwen2", EQUAL_HEADS),
        {
            "vocab_size": 131,
            "hidden_size": 48,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "kv_channels": 8,
            "seq_length": 256,
            "layer_norm_epsilon": 1e-6,
            "rotary_emb_base": 10000,
        },
        {
            **GPT_NAMES,
            "self_attn": "attn",
            "o_proj": "c_proj",
            "up_proj": "w1",
            "gate_proj": "w2",
            "down_proj": "c_proj",
        },
        lambda weights: fuse(weights, QKV, "c_attn"),
    ),
    "MiniCPMForCausalLM": Case(
        (
            "granite",
            {
                "embedding_multiplier": 12.0,
                "residual_multiplier": 1.4 / 2**0.5,
                "logits_scaling": 2.0,
                "attention_multiplier": 8**-0.5,
            },
        ),
        {**SIZES, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 24},
        {},
    ),
    "DeepseekForCausalLM": Case(
        ("qwen2_moe", SOFTMAX_MOE | {"mlp_only_layers": [0]}),
        MOE_SIZES | {"n_routed_experts": 6, "n_shared_experts": 2, "first_k_dense_replace": 1},
        {"shared_expert.": "shared_experts."},
        drop_shared_gate,
    ),
    "BailingMoeForCausalLM": Case(
        ("qwen2_moe", SOFTMAX_MOE),
        MOE_SIZES | {"num_experts": 6, "num_shared_experts": 2},
        {"shared_expert.": "shared_experts."} | BAILING_NAMES,
        lambda weights: (drop_shared_gate(weights), fuse(weights, QKV, "query_key_value")),
    ),
    "BailingMoeV2ForCausalLM": Case(
        (
            "glm4_moe",
            GROUPS
            | {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
            | {"n_shared_experts": 1, "use_qk_norm": True, "head_dim": 8, "rms_norm_eps": 1e-6},
        ),
        MOE_SIZES
        | GROUPS
        | {"num_experts": 8, "num_shared_experts": 1, "use_qk_norm": True, "head_dim": 8}
        | {"partial_rotary_factor": 0.5, "score_function": "sigmoid"},
        {"q_norm": "query_layernorm", "k_norm": "key_layernorm"}
        | {"e_score_correction_bias": "expert_bias"}
        | BAILING_NAMES,
        lambda weights: fuse(weights, QKV, "query_key_value"),
    ),
    "ExaoneForCausalLM": Case(
        ("llama", {"rms_norm_eps": 1e-5}),
        {
            **{name: value for name, value in SIZES.items() if name != "num_hidden_layers"},
            "num_layers": 2,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "silu",
        },
        {
            **GPT_NAMES,
            "self_attn": "attn.attention",
            "o_proj": "out_proj",
            "gate_proj": "c_fc_0",
            "up_proj": "c_fc_1",
            "down_proj": "c_proj",
        },
    ),
}


def renamed(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> Weights:
    found: Weights = {}
    for name, tensor in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        found[name] = tensor
    return found


@cache
def peer_of(architecture: str) -> Peer:
    case = CASES[architecture]
    model_type, fields = case.peer
    peer = make_peer(model_type, architecture, zeros="shared_expert_gate", **fields)
    weights = renamed(peer.weights, case.names)
    case.fused(weights)
    return Peer(case.fields | {"architectures": [architecture]}, weights, peer.model)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("architecture", CASES)
def test_logits_equal_the_same_mathematics(architecture: str, check: str) -> None:
    peer = peer_of(architecture)
    CHECKS[check](Session(make_decoder(peer.hf_config, peer.weights, TorchKernels())), peer)


class WithAlibi(Peer):
    """Llama where nothing rotates, since all tokens are at position 0, and scores have ALiBi."""

    def logits(self, token_ids: list[int]) -> Tensor:
        length = len(token_ids)
        bias = build_alibi_tensor(torch.ones(1, length), 6, torch.float32)[None]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        mask = bias.expand(1, 6, length, length).masked_fill(hidden, -torch.inf)
        zeros = torch.zeros(1, length, dtype=torch.int64)
        return self.model(
            torch.tensor([token_ids]), attention_mask=mask, position_ids=zeros
        ).logits[0]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("check", ["chunks of 7", "prefix hit", "beside others"])
def test_layers_that_differ_on_native_kernels(check: str, recorded: bool) -> None:
    kernels, case = native_or_skip(), CASES["DeciLMForCausalLM"]
    peer = make_peer("llama", "DeciLMForCausalLM", **case.peer[1], head_dim=32)
    vary_layers(peer.weights)
    hf = {**case.fields, "head_dim": 32, "architectures": ["DeciLMForCausalLM"]}
    model = make_decoder(hf, peer.weights, kernels)
    CHECKS[check](Session(model, recorded_by=kernels if recorded else None), peer)


class WithKeptStates(Peer):
    """Llama, where hidden states before layers 1 and 4, and in a second place before layer 2, are
    blended in before layers 3 and 5, and before layer 4."""

    def logits(self, token_ids: list[int]) -> Tensor:
        length = len(token_ids)
        inner = self.model.model
        x = inner.embed_tokens(torch.tensor([token_ids]))
        positions = torch.arange(length)[None]
        rotation = inner.rotary_emb(x, position_ids=positions)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        mask = torch.zeros(1, 1, length, length).masked_fill(hidden, -torch.inf)
        kept: dict[int, Tensor] = {}
        for index, layer in enumerate(inner.layers):
            if index in (1, 4):
                kept[1] = x
            if index == 2:
                kept[2] = x
            if index in (3, 5):
                x = 0.8 * kept[1] + 0.2 * x
            if index == 4:
                x = 0.8 * kept[2] + 0.2 * x
            x = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=rotation)
        return self.model.lm_head(inner.norm(x))[0]


@cache
def solar() -> Peer:
    peer = make_peer("llama", "SolarForCausalLM", num_hidden_layers=6)
    fields = {"bskcn_1": [1, 4], "bskcn_2": [2], "bskcn_3": [3, 5], "bskcn_4": [4]}
    hf = {**SIZES, **fields, "num_hidden_layers": 6, "bskcn_tv": [0.9, 0.8]}
    hf["architectures"] = ["SolarForCausalLM"]
    return WithKeptStates(hf, peer.weights, peer.model)


@pytest.mark.parametrize("check", CHECKS)
def test_solar_blends_hidden_states(check: str) -> None:
    peer = solar()
    CHECKS[check](Session(make_decoder(peer.hf_config, peer.weights, TorchKernels())), peer)


def test_solar_cannot_blend_what_it_has_not_kept() -> None:
    with pytest.raises(ConfigError, match="before it keeps any"):
        read_decoder(solar().hf_config | {"bskcn_1": [4], "bskcn_3": [3]})


@pytest.mark.parametrize("check", CHECKS)
def test_the_first_decilm_has_other_heads_in_each_layer(check: str) -> None:
    peer = make_peer("llama", "DeciLMForCausalLM", **EQUAL_HEADS)
    for index, per_group in enumerate((3, 2)):
        for name in ("k_proj", "v_proj"):
            key = f"model.layers.{index}.self_attn.{name}.weight"
            heads = peer.weights[key].view(-1, per_group, 8, 48)
            heads[:, 1:] = heads[:, :1]
            peer.weights[key] = heads[:, 0].reshape(-1, 48)
    hf = SIZES | {"num_key_value_heads_per_layer": [2, 3], "num_key_value_heads": None}
    model = make_decoder(
        hf | {"architectures": ["DeciLMForCausalLM"]}, peer.weights, TorchKernels()
    )
    CHECKS[check](Session(model), peer)


@pytest.mark.parametrize("check", CHECKS)
def test_the_larger_baichuan_has_alibi(check: str) -> None:
    peer = peer_of("BaichuanForCausalLM")
    hf = {name: value for name, value in peer.hf_config.items() if "position" not in name}
    other = WithAlibi(hf | {"model_max_length": 256}, peer.weights, peer.model)
    CHECKS[check](Session(make_decoder(other.hf_config, other.weights, TorchKernels())), other)


def test_the_output_layer_of_baichuan_2_has_rows_of_length_one() -> None:
    peer = make_peer(
        "llama", "BaichuanForCausalLM", vocab_size=125_696, num_hidden_layers=1, **EQUAL_HEADS
    )
    weights = dict(peer.weights)
    fuse(weights, QKV, "W_pack")
    text = random_text(9)
    head = peer.model.lm_head.weight
    head.data = torch.nn.functional.normalize(head.data)
    hf = SIZES | EQUAL_HEADS | {"vocab_size": 125_696, "num_hidden_layers": 1}
    hf["architectures"] = ["BaichuanForCausalLM"]
    got = Session(make_decoder(hf, weights, TorchKernels())).step({"a": text})["a"]
    torch.testing.assert_close(got, peer.logits(text), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("ChatGLMModel", {"post_layer_norm": False}, "no post_layer_norm"),
        ("BailingMoeForCausalLM", {"norm_head": True}, "asks for norm_head"),
        ("BailingMoeV2ForCausalLM", {"score_function": "softmax"}, "only sigmoid"),
        ("MiniCPMForCausalLM", {"num_experts": 8}, "not implemented for MiniCPM"),
        ("DeciLMForCausalLM", {"block_configs": [{}]}, "for each of its 4 layers"),
        (
            "DeciLMForCausalLM",
            {"block_configs": [{"attention": {}, "ffn": {"replace_with_linear": True}}] * 4},
            "replace_with_linear or sparsify",
        ),
    ],
)
def test_what_an_architecture_does_not_have_is_refused(
    architecture: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_decoder(CASES[architecture].fields | fields | {"architectures": [architecture]})
