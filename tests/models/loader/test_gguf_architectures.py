"""A GGUF file of each architecture gives the logits of the model that it was made of.

Names of tensors and keys come from the gguf library, not from sapwood's tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from sapwood.base.errors import ModelSourceError
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.quantization import SCHEMES
from sapwood.models.loader.weights import iterate_blocks, iterate_weights
from sapwood.store import fetch_model
from sapwood.store.gguf_architectures import ARCHITECTURES
from sapwood.store.gguf_delta import DENSE as DELTA
from sapwood.store.gguf_states import STATES
from tests.models.lm.cases import CASES, FALCON, longrope
from tests.models.lm.harness import Session, make_decoder
from tests.models.lm.peer import Peer, make_peer, random_text
from tests.models.lm.test_renamed import CASES as RENAMED
from tests.models.lm.test_renamed import vary_layers

HEAD_DIM = 32
NORMS_AFTER = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OTHERS = ("k_proj", "v_proj")
Weights = dict[str, Tensor]
GEMMA = {**NORMS_AFTER, "pre_feedforward_layernorm": "ffn_norm"}


@dataclass(frozen=True)
class File:
    """What a GGUF file says of a model.

    case    of which its configuration is, or (model_type, architecture in transformers)
    fields  of transformers' configuration, instead of the case's
    values  metadata of the architecture, beside those of all
    names   where those of the gguf library are ambiguous
    change  what llama.cpp's converter does to the weights, beside the order of rotary pairs
    """

    case: str | tuple[str, str]
    fields: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    change: Callable[[Weights], None] = lambda _: None


EQUAL_HEADS = {"attention.head_count_kv": 6}
WIDE = {"feed_forward_length": 4 * 192}


def transpose(weights: Weights) -> None:
    """GPT-2's matrices [in, out] become [out, in]."""
    for name in weights:
        if ".h." in name and weights[name].dim() == 2:
            weights[name] = weights[name].t()


def ungroup(num_kv_heads: int) -> Callable[[Weights], None]:
    """Fused projections get all queries, all keys, then all values."""

    def change(weights: Weights) -> None:
        for name in [name for name in weights if "query_key_value" in name]:
            grouped = weights[name].unflatten(0, (num_kv_heads, -1, HEAD_DIM))
            parts = (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:])
            weights[name] = torch.cat([part.flatten(0, 2) for part in parts])

    return change


def fuse_projections(name: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        for key in [key for key in weights if "q_proj" in key]:
            parts = [weights.pop(key.replace("q_proj", one)) for one in ("q_proj", *OTHERS)]
            weights[key.replace("q_proj", name)] = torch.cat(parts)

    return change


def flatten_convolutions(weights: Weights) -> None:
    for name in weights:
        if name.endswith("conv.conv.weight"):
            weights[name] = weights[name].squeeze(1)


def drop_activations(weights: Weights) -> None:
    """The numbers that Apertus' activation learns are metadata."""
    for name in [name for name in weights if ".act_fn." in name]:
        del weights[name]


def stack_streams(weights: Weights) -> None:
    """Gemma 3n's projections to and from streams lie in one tensor each."""
    for name in ("altup_projections", "altup_unembed_projections"):
        keys = sorted(key for key in weights if f".{name}." in key)
        weights[f"model.{name}.weight"] = torch.stack([weights.pop(key) for key in keys])
    for key in [key for key in weights if key.endswith("correct_output_scale")]:
        weights[f"{key}.weight"] = weights.pop(key)


FILES = {
    "llama": File(("llama", "LlamaForCausalLM"), {}),
    "mistral3": File("mistral, window", {"sliding_window": 24}, {"attention.sliding_window": 24}),
    "qwen2": File(("qwen2", "Qwen2ForCausalLM"), {}),
    "qwen3": File(("qwen3", "Qwen3ForCausalLM"), {}),
    "arcee": File("arcee", {}),
    "cohere2": File(
        "cohere2",
        {"hidden_size": 192, "num_hidden_layers": 4, "logit_scale": 0.5, "sliding_window": 24},
        {"logit_scale": 0.5, "attention.sliding_window": 24},
    ),
    "command-r": File(
        "cohere",
        {"hidden_size": 192, "logit_scale": 0.5, "use_qk_norm": True},
        {"logit_scale": 0.5},
    ),
    "ernie4_5": File("ernie4_5", {"use_bias": True, "rope_parameters": {"rope_theta": 1e4}}),
    "exaone4": File(
        "exaone4, window",
        {"num_hidden_layers": 4, "sliding_window": 24},
        {
            "attention.sliding_window": 24,
            "attention.sliding_window_pattern": [True, True, True, False],
        },
        NORMS_AFTER,
    ),
    "gemma": File("gemma", {}),
    "gemma2": File(
        "gemma2",
        {
            "sliding_window": 24,
            "query_pre_attn_scalar": HEAD_DIM,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
        },
        {
            "attention.sliding_window": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
        },
        GEMMA,
    ),
    "gemma3": File(
        "gemma3",
        {
            "num_hidden_layers": 6,
            "sliding_window": 24,
            "query_pre_attn_scalar": HEAD_DIM,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {
            "attention.sliding_window": 24,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        GEMMA,
    ),
    "glm4": File(
        "glm4",
        {"pad_token_id": None},
        {"rope.dimension_count": HEAD_DIM // 2},
        {
            "post_self_attn_layernorm": "post_attention_norm",
            "post_attention_layernorm": "ffn_norm",
            "post_mlp_layernorm": "post_ffw_norm",
        },
    ),
    "granite": File(
        "granite",
        {
            "attention_multiplier": 0.25,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.5,
        },
        {
            "attention.scale": 0.25,
            "embedding_scale": 3.0,
            "residual_scale": 0.5,
            "logit_scale": 2.5,
        },
    ),
    "hunyuan-dense": File(
        "hunyuan",
        {},
        {},
        {"query_layernorm": "attn_q_norm", "key_layernorm": "attn_k_norm"},
    ),
    "minicpm": File(
        ("granite", "MiniCPMForCausalLM"),
        dict(RENAMED["MiniCPMForCausalLM"].peer[1], attention_multiplier=HEAD_DIM**-0.5),
        {"embedding_scale": 12.0, "residual_scale": 1.4 / 2**0.5, "logit_scale": 2.0},
    ),
    "nemotron": File("nemotron", {}, {"rope.dimension_count": HEAD_DIM // 2}),
    "olmo": File(
        "olmo",
        {"hidden_size": 192, "clip_qkv": 0.5, "pad_token_id": None},
        {"attention.clamp_kqv": 0.5},
    ),
    "olmo2": File("olmo2", {}, {}, NORMS_AFTER),
    "phi2": File("phi", {"hidden_size": 192}, {"rope.dimension_count": HEAD_DIM // 2}),
    "phi3": File(
        "phi3, long",
        {
            "hidden_size": 192,
            "rope_parameters": {**longrope(12, 8), "partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 8,
            "pad_token_id": None,
        },
        {"rope.dimension_count": 24, "rope.scaling.original_context_length": 8},
    ),
    "seed_oss": File(
        "seed_oss",
        {"attention_out_bias": True},
        {},
        {"post_attention_layernorm": "post_attention_norm"},
    ),
    "smollm3": File("smollm3", {"num_hidden_layers": 4, "pad_token_id": None}),
    "stablelm": File(
        "stablelm",
        {"hidden_size": 192, "use_qkv_bias": True, "use_parallel_residual": True},
        {"rope.dimension_count": HEAD_DIM // 4, "use_parallel_residual": True},
    ),
    "starcoder2": File("starcoder2, no biases", {"use_bias": True}),
    "apertus": File("apertus", {"rope_parameters": {"rope_theta": 1e4}}, {}, {}, drop_activations),
    "baichuan": File(("llama", "BaichuanForCausalLM"), {"num_key_value_heads": 6}),
    "bloom": File("bloom", {"hidden_size": 192}, {**EQUAL_HEADS, **WIDE}, {}, ungroup(6)),
    "chatglm": File(
        ("glm", "ChatGLMModel"),
        {"attention_bias": True, "pad_token_id": None},
        {"rope.dimension_count": HEAD_DIM // 2},
        {},
        fuse_projections("query_key_value"),
    ),
    "deci": File(
        ("llama", "DeciLMForCausalLM"),
        {"num_hidden_layers": 4, "intermediate_size": 512, "num_key_value_heads": 6},
        {
            "attention.head_count": [6, 0, 6, 6],
            "attention.head_count_kv": [2, 0, 6, 3],
            "feed_forward_length": [512, 256, 0, 256],
        },
        {},
        vary_layers,
    ),
    "gemma3n": File(
        "gemma3n",
        CASES["gemma3n"][2] | {"intermediate_size": 80},
        {
            "activation_sparsity_scale": [
                -math.inf if share == 0 else NormalDist().inv_cdf(share)
                for share in CASES["gemma3n"][2]["activation_sparsity_pattern"]
            ],
            "altup.active_idx": 0,
            "altup.num_inputs": 4,
            "attention.shared_kv_layers": 3,
            "attention.sliding_window": 24,
            "attention.sliding_window_pattern": [True, False, True, True, False],
            "embedding_length_per_layer_input": 16,
            "feed_forward_length": 80,
            "final_logit_softcapping": 1.5,
            "rope.freq_base": 1e6,
        },
        {},
        stack_streams,
    ),
    "exaone": File(("llama", "ExaoneForCausalLM"), {}),
    "falcon": File(
        "falcon, two norms",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        {"attention.head_count_kv": 2, "feed_forward_length": 80},
        {},
        ungroup(2),
    ),
    "gpt2": File("gpt2", {"hidden_size": 192}, {**EQUAL_HEADS, **WIDE}, {}, transpose),
    "gptneox": File(
        "gpt_neox",
        {"hidden_size": 192},
        {"rope.dimension_count": HEAD_DIM // 4, "use_parallel_residual": True} | EQUAL_HEADS,
        {},
        ungroup(6),
    ),
    "internlm2": File(("llama", "LlamaForCausalLM"), {}),
    "lfm2": File(
        "lfm2",
        CASES["lfm2"][2],
        {
            "attention.head_count_kv": [0, 2, 0, 0],
            "shortconv.l_cache": 3,
            "feed_forward_length": 64,
        },
        {},
        flatten_convolutions,
    ),
    "mpt": File(
        "mpt",
        CASES["mpt, uncut"][2] | {"attn_config": {"clip_qkv": 1.5}},
        {"attention.clamp_kqv": 1.5, "attention.max_alibi_bias": 8.0, **EQUAL_HEADS, **WIDE},
    ),
    "orion": File(
        ("stablelm", "OrionForCausalLM"),
        {
            "hidden_size": 192,
            "rope_parameters": {"partial_rotary_factor": 1.0, "rope_theta": 1e4},
        },
    ),
    "qwen": File(
        ("qwen2", "QWenLMHeadModel"),
        {"num_key_value_heads": 6},
        {"feed_forward_length": 160},
        {"c_attn": "attn_qkv"},
        fuse_projections("c_attn"),
    ),
    "starcoder": File(
        "gpt_bigcode",
        {"hidden_size": 192},
        {"attention.head_count_kv": 1, **WIDE},
    ),
    "xverse": File(("llama", "XverseForCausalLM"), {}),
}
INTERLEAVED = (
    *("llama", "mistral3", "arcee", "granite", "minicpm", "olmo", "smollm3"),
    *("baichuan", "internlm2", "xverse", "deci"),
)
"""Whose pairs llama.cpp rotates next to each other, unlike transformers."""
LAYER_NORM_EPSILONS = ("layer_norm_eps", "norm_epsilon", "norm_eps", "layer_norm_epsilon")
LARGER_BY_ONE = ("gemma", "gemma2", "gemma3", "nemotron")


def peer_of(file: File) -> Peer:
    model_type, architecture = file.case if isinstance(file.case, tuple) else CASES[file.case][:2]
    fields = {"head_dim": HEAD_DIM} | file.fields
    if fields["head_dim"] is None:  # a property of the configuration, which cannot be set
        del fields["head_dim"]
    return make_peer(model_type, architecture, **fields)


def write(path: Path, name: str, file: File, peer: Peer, *, in_blocks: bool = False) -> None:
    """`in_blocks`: matrices are quantised, where a row holds whole blocks."""
    hf, known = peer.hf_config, peer.model.config
    num_layers, num_heads = known.num_hidden_layers, known.num_attention_heads
    writer = gguf.GGUFWriter(str(path), name)
    for key, value in {
        "block_count": num_layers,
        "context_length": hf.get("max_position_embeddings", 256),
        "embedding_length": known.hidden_size,
        "feed_forward_length": hf.get("intermediate_size", 80),
        "attention.head_count": num_heads,
        "attention.head_count_kv": hf.get("num_key_value_heads", num_heads),
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "rope.freq_base": (hf.get("rope_parameters") or {}).get("rope_theta", 1e4),
        **epsilons(hf),
        **file.values,
    }.items():
        add(writer, f"{name}.{key}", value)
    for key, values in learned(peer).items():
        writer.add_array(key, values)
    arch = next(one for one, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(arch, num_layers)
    weights = dict(peer.weights)
    file.change(weights)
    for key, tensor in weights.items():
        if key == "lm_head.weight" and names.get_name("lm_head") is None:
            assert known.tie_word_embeddings
            continue
        data = tensor
        if name in INTERLEAVED and ("q_proj" in key or "k_proj" in key):
            data = tensor.view(-1, 2, HEAD_DIM // 2, *tensor.shape[1:]).transpose(1, 2)
            data = data.reshape(tensor.shape)
        if name in LARGER_BY_ONE and key.endswith("norm.weight"):
            data = tensor + 1
        values = data.contiguous().numpy()
        if in_blocks and values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            blocks = gguf.quantize(values, kind)
            writer.add_tensor(stored_name(key, file, names), blocks, raw_dtype=kind)
        else:
            writer.add_tensor(stored_name(key, file, names), values)
    rope = hf.get("rope_parameters") or {}
    for kind in ("short", "long"):
        if f"{kind}_factor" in rope:
            factors = torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
            writer.add_tensor(f"rope_factors_{kind}.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def epsilons(hf: dict[str, Any]) -> dict[str, float]:
    plain = next((hf[name] for name in LAYER_NORM_EPSILONS if hf.get(name)), None)
    if hf["model_type"] == "lfm2":
        return {"attention.layer_norm_rms_epsilon": hf["norm_eps"]}
    if hf["model_type"] == "olmo":
        plain = 1e-5
    if plain is not None:
        return {"attention.layer_norm_epsilon": plain}
    return {"attention.layer_norm_rms_epsilon": hf["rms_norm_eps"]}


def learned(peer: Peer) -> dict[str, list[float]]:
    """The numbers that Apertus' activation has, of all layers; these keys have no architecture."""
    return {
        f"xielu.{name}": [one.item() for key, one in peer.weights.items() if key.endswith(name)]
        for name in ("alpha_p", "alpha_n", "beta", "eps")
        if any(key.endswith(name) for key in peer.weights)
    }


def stored_name(key: str, file: File, names: gguf.TensorNameMap) -> str:
    """The tensor's name in GGUF files."""
    whole, _, kind = key.rpartition(".")
    part = whole.rpartition(".")[2]
    if part in file.names:
        return f"blk.{whole.split('.')[2]}.{file.names[part]}.{kind}"
    found = names.get_name(whole) or names.get_name(whole.removeprefix("transformer."))
    assert found is not None, key
    return f"{found}.{kind}"


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def logits_of(path: Path, tmp_path: Path, text: list[int]) -> Tensor:
    files = fetch_model(str(path), home=tmp_path / "home")
    weights = dict(iterate_weights(files, dtype=torch.float32))
    model = make_decoder(
        json.loads((files.path / "config.json").read_text()), weights, TorchKernels()
    )
    return Session(model).step({"a": text})["a"]


def test_every_architecture_has_a_file() -> None:
    elsewhere = {*STATES, *DELTA}  # test_gguf_states.py, test_gguf_delta.py
    assert FILES.keys() == ARCHITECTURES.keys() - elsewhere


@pytest.mark.parametrize("name", FILES)
def test_logits_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    file, text = FILES[name], random_text(40)
    peer = peer_of(file)
    write(tmp_path / "m.gguf", name, file, peer)
    got = logits_of(tmp_path / "m.gguf", tmp_path, text)
    torch.testing.assert_close(got, peer.logits(text), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["phi3", "glm4", "command-r", "granite"])
def test_blocks_are_placed_like_numbers(name: str, tmp_path: Path) -> None:
    """In fused layers, and where rows come in another order."""
    file, text = FILES[name], random_text(20)
    sizes = {"hidden_size": 192, "intermediate_size": 96}
    peer = peer_of(replace(file, fields=file.fields | sizes))
    write(tmp_path / "m.gguf", name, file, peer, in_blocks=True)
    files = fetch_model(str(tmp_path / "m.gguf"), home=tmp_path / "home")
    weights = dict(iterate_blocks(files, dtype=torch.float32))
    assert sum(isinstance(one, QuantizedWeight) for one in weights.values()) > 8
    config = json.loads((files.path / "config.json").read_text())
    scheme = SCHEMES.get("gguf")()
    model = make_decoder(config, weights, TorchKernels(), scheme=scheme)  # type: ignore[arg-type]
    got = Session(model).step({"a": text})["a"]
    want = logits_of(tmp_path / "m.gguf", tmp_path, text)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=0)
    assert (want - peer.logits(text)).abs().max() > 4e-3  # the comparison could see such an error


def test_norms_of_heads_in_one_tensor_are_refused(tmp_path: Path) -> None:
    file = FILES["stablelm"]
    peer = peer_of(file)
    peer.weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(6, HEAD_DIM)
    write(tmp_path / "m.gguf", "stablelm", file, peer)
    with pytest.raises(ModelSourceError, match="norms of each head in one tensor"):
        logits_of(tmp_path / "m.gguf", tmp_path, [1])


def test_the_largest_gemmas_scale_scores_by_their_width(tmp_path: Path) -> None:
    for name, num_layers in (("gemma2", 46), ("gemma3", 62)):
        more = ARCHITECTURES[name].more
        config = {
            "num_hidden_layers": num_layers,
            "hidden_size": 4608,
            "num_attention_heads": 32,
            "head_dim": 128,
        }
        found = more(_Metadata({"attention.sliding_window": 9}), config)
        assert found["query_pre_attn_scalar"] == 144
        assert (
            more(_Metadata({"attention.sliding_window": 9}), config | {"num_hidden_layers": 2})[
                "query_pre_attn_scalar"
            ]
            == 128
        )


class _Metadata(dict[str, Any]):
    def has(self, tensor: str) -> bool:
        return False


def test_factors_of_minicpm_are_those_of_its_config() -> None:
    config = {"num_hidden_layers": 40, "hidden_size": 2304}
    values = {
        "embedding_scale": 12.0,
        "residual_scale": 1.4 / math.sqrt(40),
        "logit_scale": 9.0,
    }
    found = ARCHITECTURES["minicpm"].more(_Metadata(values), config)
    assert found["dim_model_base"] == 256
    assert found["scale_depth"] == pytest.approx(1.4)
