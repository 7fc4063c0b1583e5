"""A GGUF file of each mixture gives the logits of the model that it was made of.

Names of tensors come from the gguf library, not from sapwood's tables."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from sapwood.base.errors import ModelSourceError
from sapwood.kernels.coded import CodedWeight, LinearPart
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.quantization import SCHEMES
from sapwood.models.loader.gguf import hf_name
from sapwood.models.loader.weights import iterate_blocks, iterate_weights
from sapwood.store import fetch_model
from sapwood.store.gguf_delta import MIXTURES as DELTA
from sapwood.store.gguf_mixtures import MIXTURES
from tests.models.lm import test_renamed
from tests.models.lm.cases import CASES
from tests.models.lm.harness import Session, make_decoder
from tests.models.lm.peer import Peer, make_peer, random_text
from tests.models.loader.test_gguf_architectures import add

HEAD_DIM = 32
SIZES = {"hidden_size": 192, "head_dim": HEAD_DIM, "intermediate_size": 96}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 32.0,
    "rope.scaling.original_context_length": 4096,
    "attention.sliding_window": 24,
}
GROUPED = {
    "n_routed_experts": 4, "moe_intermediate_size": 64, "n_shared_experts": 2,
    "routed_scaling_factor": 1.5, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True,
}  # fmt: skip
GROUPED_VALUES = {
    "expert_feed_forward_length": 64, "expert_shared_count": 2, "expert_weights_scale": 1.5,
    "expert_gating_func": 2, "expert_weights_norm": True, "leading_dense_block_count": 1,
}  # fmt: skip
LAYERS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down",
          "w1": "gate", "w3": "up", "w2": "down"}  # fmt: skip


@dataclass(frozen=True)
class File:
    """What a GGUF file says of a mixture.

    case    of which its configuration is
    fields  of transformers' configuration, instead of the case's
    values  metadata of the architecture, beside those of all
    """

    case: str
    fields: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


FILES = {
    "llama": File("mixtral"),
    "bailingmoe2": File(
        "BailingMoeV2ForCausalLM",
        {},
        {
            **GROUPED_VALUES,
            "attention.key_length": 8,
            "attention.value_length": 8,
            "rope.dimension_count": 4,
            "expert_feed_forward_length": 40,
            "expert_shared_count": 1,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
        },
    ),
    "dots1": File("dots1", GROUPED, GROUPED_VALUES),
    "ernie4_5-moe": File(
        "ernie4_5_moe",
        {"moe_intermediate_size": 64, "moe_layer_start_index": 1, "moe_layer_end_index": -1},
        {
            "expert_feed_forward_length": 64,
            "expert_shared_count": 2,
            "leading_dense_block_count": 1,
            "interleave_moe_layer_step": 1,
        },
    ),
    "glm4moe": File(
        "glm4_moe",
        {**GROUPED, "use_qk_norm": True},
        {**GROUPED_VALUES, "rope.dimension_count": HEAD_DIM // 2},
    ),
    "gpt-oss": File("gpt_oss", {"sliding_window": 24}, {"expert_feed_forward_length": 96, **YARN}),
    "granitemoe": File(
        "granitemoe",
        {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25},
        {"embedding_scale": 2.0, "residual_scale": 0.5, "attention.scale": 0.25},
    ),
    "hunyuan-moe": File(
        "hunyuan_v1_moe",
        {},
        {"expert_feed_forward_length": 96, "expert_used_count": 3, "expert_shared_count": 1},
    ),
    "lfm2moe": File(
        "lfm2_moe",
        {"moe_intermediate_size": 64, "conv_bias": False},
        {
            "attention.head_count_kv": [0, 2, 0, 2],
            "shortconv.l_cache": 3,
            "expert_feed_forward_length": 64,
            "leading_dense_block_count": 1,
        },
    ),
    "minimax-m2": File(
        "minimax_m2", {}, {"expert_feed_forward_length": 96, "rope.dimension_count": 16}
    ),
    "olmoe": File("olmoe"),
    "phimoe": File(
        "phimoe",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "router_jitter_noise": 0.01,
        },
    ),
    "qwen2moe": File(
        "qwen2_moe",
        {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96, "mlp_only_layers": []},
        {"expert_feed_forward_length": 64, "expert_shared_feed_forward_length": 96},
    ),
    "qwen3moe": File(
        "qwen3_moe",
        {"moe_intermediate_size": 64, "mlp_only_layers": [], "norm_topk_prob": True},
        {"expert_feed_forward_length": 64},
    ),
}
INTERLEAVED = ("llama", "granitemoe")
"""Whose pairs llama.cpp rotates next to each other, unlike transformers."""


def peer_of(file: File) -> Peer:
    if file.case in test_renamed.CASES:
        return test_renamed.peer_of(file.case)
    model_type, architecture, fields = CASES[file.case]
    return make_peer(model_type, architecture, **(fields | SIZES | file.fields))


CHOSEN = ("num_experts_per_tok", "moe_k")


def number_of(hf: Mapping[str, Any], *names: str) -> int:
    return next(int(hf[name]) for name in names if hf.get(name) is not None)


def metadata(file: File, hf: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "block_count": hf["num_hidden_layers"],
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "feed_forward_length": hf["intermediate_size"],
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": hf.get("rms_norm_eps", hf.get("norm_eps", 1e-6)),
        "rope.freq_base": (hf.get("rope_parameters") or {}).get("rope_theta", 1e4),
        "expert_count": number_of(
            hf, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"
        ),
        "expert_used_count": number_of(hf, *CHOSEN)
        if "expert_used_count" not in file.values
        else 0,
        **file.values,
    }


def stacked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights whose experts lie in one tensor per layer: "model.layers.0.mlp.experts.gate.weight",
    as "blk.0.ffn_gate_exps.weight" here."""
    found: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for name, tensor in weights.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        apart = re.search(r"\.experts\.\d+\.(\w+)\.weight$", name)
        fused = re.search(r"\.(?:experts\.)?(gate_up_proj|down_proj)(_bias)?$", name)
        granite = re.search(r"\.(input|output)_linear\.weight$", name)
        if layer and apart:
            own = f"blk.{layer[1]}.ffn_{LAYERS[apart[1]]}_exps.weight"
            experts.setdefault(own, []).append(tensor)
        elif layer and fused:  # gpt-oss: [experts, in, out], outputs of gate and up take turns
            kind = "bias" if fused[2] else "weight"
            rows = tensor if fused[2] else tensor.transpose(1, 2)
            if fused[1] == "down_proj":
                found[f"blk.{layer[1]}.ffn_down_exps.{kind}"] = rows
            else:
                found[f"blk.{layer[1]}.ffn_gate_exps.{kind}"] = rows[:, 0::2]
                found[f"blk.{layer[1]}.ffn_up_exps.{kind}"] = rows[:, 1::2]
        elif layer and granite:
            parts = tensor.chunk(2, dim=1) if granite[1] == "input" else (tensor,)
            kinds = ("gate", "up") if granite[1] == "input" else ("down",)
            for part, kind in zip(parts, kinds, strict=True):
                found[f"blk.{layer[1]}.ffn_{kind}_exps.weight"] = part
        else:
            found[name] = tensor
    return found | {name: torch.stack(each) for name, each in experts.items()}


def write(
    path: Path,
    name: str,
    *,
    experts: gguf.GGMLQuantizationType | None = None,
    more: Mapping[str, Any] | None = None,
    others: Mapping[str, Tensor] | None = None,
) -> Peer:
    """A file of the mixture, of which this is the model.

    experts  the type of the experts' tensors; None: fp32
    more     metadata instead of the file's
    others   tensors beside the model's"""
    file = FILES[name]
    peer = peer_of(file)
    hf = peer.hf_config
    writer = gguf.GGUFWriter(str(path), name)
    for key, value in {**metadata(file, hf), **(more or {})}.items():
        add(writer, f"{name}.{key}", value)
    arch = next(one for one, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(arch, hf["num_hidden_layers"])
    for key, tensor in {**stacked(peer.weights), **(others or {})}.items():
        data = tensor
        if name in INTERLEAVED and ("q_proj" in key or "k_proj" in key):
            data = tensor.view(-1, 2, HEAD_DIM // 2, *tensor.shape[1:]).transpose(1, 2)
            data = data.reshape(tensor.shape)
        values = data.squeeze().contiguous().numpy()
        if experts is not None and key.endswith("_exps.weight"):
            writer.add_tensor(key, gguf.quantize(values, experts), raw_dtype=experts)
        else:
            writer.add_tensor(key if key.startswith("blk.") else stored_name(key, names), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return peer


def stored_name(key: str, names: gguf.TensorNameMap) -> str:
    """The tensor's name in GGUF files."""
    whole = key.replace("e_score_correction_bias", "e_score_correction.bias")
    whole = f"{whole}.bias" if whole.endswith("expert_bias") else whole
    whole = f"{whole}.weight" if whole.endswith("sinks") else whole
    module, _, kind = whole.rpartition(".")
    found = names.get_name(module)
    assert found is not None, key
    return f"{found}.{kind}"


def logits_of(path: Path, home: Path, text: list[int], *, in_blocks: bool = False) -> Tensor:
    files = fetch_model(str(path), home=home)
    config = json.loads((files.path / "config.json").read_text())
    weights: dict[str, Any] = dict(
        (iterate_blocks if in_blocks else iterate_weights)(files, dtype=torch.float32)
    )
    how = {"scheme": SCHEMES.get("gguf")()} if in_blocks else {}
    return Session(make_decoder(config, weights, TorchKernels(), **how)).step({"a": text})["a"]


def test_every_mixture_has_a_file() -> None:
    elsewhere = {"deepseek2", "granitehybrid", "jamba", "nemotron_h_moe", *DELTA}
    # test_gguf_latent.py, test_gguf_states.py, test_gguf_delta.py
    assert FILES.keys() == MIXTURES.keys() - elsewhere


@pytest.mark.parametrize("name", FILES)
def test_logits_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    text = random_text(40)
    peer = write(tmp_path / "m.gguf", name)
    got = logits_of(tmp_path / "m.gguf", tmp_path / "home", text)
    torch.testing.assert_close(got, peer.logits(text), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "Q8_0"), ("gpt-oss", "MXFP4"), ("qwen2moe", "Q4_0")]
)
def test_experts_keep_the_blocks_of_the_file(name: str, kind: str, tmp_path: Path) -> None:
    text = random_text(20)
    write(tmp_path / "m.gguf", name, experts=gguf.GGMLQuantizationType[kind])
    files = fetch_model(str(tmp_path / "m.gguf"), home=tmp_path / "home")
    found = dict(iterate_blocks(files, dtype=torch.float32))
    experts = [one for key, one in found.items() if ".experts." in key and key.endswith("weight")]
    wanted: type[LinearPart] = CodedWeight if kind == "MXFP4" else QuantizedWeight
    assert experts
    assert all(isinstance(one, wanted) for one in experts)
    got = logits_of(tmp_path / "m.gguf", tmp_path / "home", text, in_blocks=True)
    want = logits_of(tmp_path / "m.gguf", tmp_path / "home", text)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_mxfp4_blocks_are_what_the_gguf_library_says(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.MXFP4
    write(tmp_path / "m.gguf", "gpt-oss", experts=kind)
    files = fetch_model(str(tmp_path / "m.gguf"), home=tmp_path / "home")
    blocks = dict(iterate_blocks(files, dtype=torch.float32))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    stored = next(one for one in reader.tensors if one.name == "blk.1.ffn_down_exps.weight")
    want = gguf.dequantize(np.asarray(stored.data), kind)
    for expert, rows in enumerate(want):
        found = blocks[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"]
        assert isinstance(found, CodedWeight)
        torch.testing.assert_close(found.dequantized(torch.float32), torch.from_numpy(rows),
                                   atol=0, rtol=0)  # fmt: skip


def test_layers_that_guess_further_tokens_are_left_out(tmp_path: Path) -> None:
    text = random_text(10)
    others = {
        "blk.2.nextn.eh_proj.weight": torch.ones(192, 384),
        "blk.2.attn_norm.weight": torch.ones(192),
    }
    more = {"block_count": 3, "nextn_predict_layers": 1}
    peer = write(tmp_path / "m.gguf", "glm4moe", more=more, others=others)
    got = logits_of(tmp_path / "m.gguf", tmp_path / "home", text)
    torch.testing.assert_close(got, peer.logits(text), atol=1e-4, rtol=0)


def test_tensors_of_single_experts_in_old_files() -> None:
    names = MIXTURES["llama"].names
    assert hf_name("blk.3.ffn_gate.11.weight", names) == (
        "model.layers.3.block_sparse_moe.experts.11.w1.weight"
    )
    assert hf_name("blk.3.ffn_norm.11.weight", names) is None


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("glm4moe", {"expert_gating_func": 1}, "expert_gating_func 1"),
        ("granitemoe", {"expert_shared_feed_forward_length": 64}, "experts that every token has"),
    ],
)
def test_other_choices_are_refused(
    name: str, more: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "m.gguf", name, more=more)
    with pytest.raises(ModelSourceError, match=message):
        logits_of(tmp_path / "m.gguf", tmp_path / "home", [1])


def test_a_dense_architecture_with_experts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "gemma2")
    add(writer, "gemma2.expert_count", 8)
    writer.add_tensor("token_embd.weight", np.ones((8, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ModelSourceError, match=r"'gemma2' with experts, .* known with experts: llama"
    ):
        fetch_model(str(path), home=tmp_path / "home")
