"""A GGUF file of each architecture with state space layers gives the logits of the model that it
was made of.

Names of tensors come from the gguf library, not from sapwood's tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from sapwood.base.errors import ModelSourceError, WeightError
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.models.loader.gguf import iterate, iterate_blocks
from sapwood.store import fetch_model
from sapwood.store.gguf_states import STATES
from tests.models.lm.cases import CASES
from tests.models.lm.peer import Peer, make_peer, random_text
from tests.models.loader.test_gguf_architectures import add
from tests.models.loader.test_gguf_mixtures import logits_of, stacked

HEAD_DIM = 32
RATES_OF_HEADS = ("falcon-h1", "granitehybrid", "mamba2", "nemotron_h", "nemotron_h_moe")
"""Architectures whose rates are [heads, 1] in files."""
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class File:
    """What a GGUF file says of a model.

    case       of which its configuration is
    arch       the file's architecture
    groups     of the norms of Mamba 2
    values     metadata of the architecture, beside those of all
    fields     of transformers' configuration, instead of the case's
    change     what llama.cpp's converter does to the weights, beside what it does to every state
    """

    case: str
    arch: str
    groups: int
    values: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Weights, Mapping[str, Any]], None] = lambda weights, hf: None


def multiply(weights: Weights, hf: Mapping[str, Any]) -> None:
    """Falcon H1's multipliers become parts of its weights."""
    inner = hf["attention_in_multiplier"]
    factors = {
        "down_proj": hf["mlp_multipliers"][1],
        "gate_proj": hf["mlp_multipliers"][0],
        "k_proj": hf["key_multiplier"] * inner,
        "q_proj": inner,
        "v_proj": inner,
        "o_proj": hf["attention_out_multiplier"],
        "mamba.out_proj": hf["ssm_out_multiplier"],
        "mamba.in_proj": hf["ssm_in_multiplier"],
        "lm_head": hf["lm_head_multiplier"],
        "embed_tokens": hf["embedding_multiplier"],
    }
    width, keys = hf["mamba_d_ssm"], hf["mamba_n_groups"] * hf["mamba_d_state"]
    sizes = torch.tensor([width, width, keys, keys, hf["mamba_n_heads"]])
    parts = torch.tensor(hf["ssm_multipliers"]).repeat_interleave(sizes)
    for name in weights:
        for part, factor in factors.items():
            if part in name:
                weights[name] = weights[name] * factor
        if "mamba.in_proj.weight" in name:
            weights[name] = weights[name] * parts[:, None]


def granite_layers(weights: Weights, hf: Mapping[str, Any]) -> None:
    """The shared expert's projections lie apart, and pairs of rotary entries next to each other."""
    for name in list(weights):
        dense = "mlp" if not hf["num_local_experts"] else "mlp.shared_expert"
        own = name.replace("shared_mlp", dense)
        if "shared_mlp.input_linear" in name:
            gate, up = weights.pop(name).chunk(2)
            weights[own.replace("input_linear", "gate_proj")] = gate
            weights[own.replace("input_linear", "up_proj")] = up
        elif "shared_mlp.output_linear" in name:
            weights[own.replace("output_linear", "down_proj")] = weights.pop(name)
        elif "q_proj" in name or "k_proj" in name:
            pairs = weights[name].view(-1, 2, HEAD_DIM // 2, weights[name].shape[1])
            weights[name] = pairs.transpose(1, 2).reshape(weights[name].shape)


def nemotron_experts(weights: Weights, hf: Mapping[str, Any]) -> None:
    for name in [name for name in weights if ".mixer.experts." in name]:
        layer, part = name.split(".")[2], name.split(".")[-1].removesuffix("_proj")
        weights[f"blk.{layer}.ffn_{part}_exps.weight"] = weights.pop(name)


def sizes(length: int, width: int, state: int, rank: int, groups: int | None) -> dict[str, int]:
    """Metadata of state space layers; rank: heads, or for Mamba the rank of time steps."""
    found = {"conv_kernel": length, "inner_size": width, "state_size": state}
    found |= {"time_step_rank": rank} | ({} if groups is None else {"group_count": groups})
    return {f"ssm.{name}": value for name, value in found.items()}


NO_ATTENTION = {"attention.head_count": 0, "feed_forward_length": 0, "context_length": 2**20}
GRANITE = {"attention_multiplier": 0.2, "residual_multiplier": 0.4}
GRANITE_VALUES = {"attention.scale": 0.2, "residual_scale": 0.4}
FILES = {
    "mamba": File(
        "mamba",
        "mamba",
        1,
        {**sizes(4, 96, 6, 6, None), **NO_ATTENTION, "ssm.dt_b_c_rms": False},
        {"intermediate_size": 96},
    ),
    "falcon mamba": File(
        "falcon_mamba",
        "mamba",
        1,
        {**sizes(4, 96, 6, 4, None), **NO_ATTENTION, "ssm.dt_b_c_rms": True},
        {"use_bias": False, "intermediate_size": 96},
    ),
    "mamba2": File(
        "mamba2", "mamba2", 2, {**sizes(4, 96, 12, 6, 2), **NO_ATTENTION}, {"use_bias": False}
    ),
    "falcon-h1": File("falcon_h1", "falcon-h1", 1, sizes(4, 64, 8, 4, 1), {}, multiply),
    "falcon-h1, norms": File(
        "falcon_h1, norms",
        "falcon-h1",
        2,
        sizes(4, 64, 8, 4, 2),
        {"mamba_proj_bias": False, "projectors_bias": False, "mamba_norm_before_gate": False},
        multiply,
    ),
    "nemotron_h": File(
        "nemotron_h",
        "nemotron_h",
        2,
        {
            **sizes(4, 96, 8, 6, 2),
            "block_count": 4,
            "attention.head_count_kv": [0, 0, 2, 0],
            "feed_forward_length": [0, 80, 0, 0],
        },
    ),
    "granitehybrid": File(
        "granitemoehybrid, no experts",
        "granitehybrid",
        1,
        {
            **sizes(4, 96, 8, 6, 1),
            **GRANITE_VALUES,
            "attention.head_count_kv": [0, 2],
            "rope.scaling.finetuned": True,
            "expert_shared_feed_forward_length": 40,
        },
        GRANITE,
        granite_layers,
    ),
}
MIXTURES = {
    "granitehybrid": File(
        "granitemoehybrid",
        "granitehybrid",
        1,
        {
            **sizes(4, 96, 8, 6, 1),
            **GRANITE_VALUES,
            "attention.head_count_kv": [0, 2, 0],
            "rope.scaling.finetuned": False,
            "expert_count": 5,
            "expert_used_count": 2,
            "expert_shared_feed_forward_length": 40,
        },
        {},
        granite_layers,
    ),
    "jamba": File(
        "jamba",
        "jamba",
        1,
        {
            **sizes(3, 96, 6, 8, None),
            "attention.head_count_kv": [0, 2, 0, 0],
            "expert_count": 4,
            "expert_used_count": 2,
        },
    ),
    "nemotron_h_moe": File(
        "nemotron_h, experts",
        "nemotron_h_moe",
        2,
        {
            **sizes(4, 96, 8, 6, 2),
            "block_count": 4,
            "attention.head_count_kv": [0, 0, 2, 0],
            "feed_forward_length": [40, 0, 0, 40],
            "expert_count": 8,
            "expert_used_count": 3,
            "expert_feed_forward_length": 40,
            "expert_shared_feed_forward_length": 56,
            "expert_shared_count": 1,
            "expert_weights_norm": True,
            "expert_weights_scale": 1.5,
            "expert_group_count": 1,
            "moe_latent_size": 24,
        },
        {},
        nemotron_experts,
    ),
}
"""Those with experts."""
EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_rms_epsilon")


def peer_of(file: File) -> Peer:
    model_type, architecture, fields = CASES[file.case]
    fields = {"head_dim": HEAD_DIM} | fields | file.fields
    if fields["head_dim"] is None:  # a property of the configuration, which cannot be set
        del fields["head_dim"]
    return make_peer(model_type, architecture, **fields)


def stored_weights(file: File, peer: Peer) -> Weights:
    """By name in GGUF files."""
    weights = dict(peer.weights)
    file.change(weights, peer.hf_config)
    arch = next(one for one, known in gguf.MODEL_ARCH_NAMES.items() if known == file.arch)
    names = gguf.get_tensor_name_map(arch, 8)
    found = {}
    for key, tensor in stacked(weights).items():
        if key.startswith("blk."):
            found[key] = tensor
            continue
        whole = key.replace(".dt_bias", ".dt_proj.bias")
        whole = whole.replace("e_score_correction_bias", "e_score_correction.bias")
        kinds = (".weight", ".bias")
        stored = names.get_name(whole, try_suffixes=kinds) or names.get_name(
            whole.replace("model.", "backbone.", 1), try_suffixes=kinds
        )
        assert stored is not None, key
        data = tensor
        if "conv1d.weight" in whole:
            data = tensor.squeeze(1)
        elif whole.endswith(".A_log"):
            data = -tensor.exp()
        elif "ssm_norm" in stored:
            data = tensor.view(file.groups, -1)
        per_head = stored.endswith((".ssm_a", ".ssm_d")) and file.arch in RATES_OF_HEADS
        found[stored] = data[:, None] if per_head else data
    return found


def write(
    path: Path,
    file: File,
    *,
    weights: Weights | None = None,
    in_blocks: bool = False,
    **changes: Any,
) -> Peer:
    """A file of the model that is returned.

    weights    instead of the model's
    in_blocks  whether matrices are quantised, where a row holds whole blocks
    changes    of the metadata"""
    peer = peer_of(file)
    hf = peer.hf_config
    writer = gguf.GGUFWriter(str(path), file.arch)
    nemotron = file.arch.startswith("nemotron")
    epsilon = "layer_norm_epsilon" if nemotron else "layer_norm_rms_epsilon"
    said = {
        "block_count": hf.get("num_hidden_layers", 0),
        "context_length": hf.get("max_position_embeddings", 256),
        "embedding_length": hf["hidden_size"],
        "feed_forward_length": hf.get("intermediate_size", 80),
        f"attention.{epsilon}": next(hf[one] for one in EPSILONS if one in hf),
        **file.values,
    }
    if "attention.head_count" not in file.values:
        own = {
            "head_count": hf["num_attention_heads"],
            "head_count_kv": hf["num_key_value_heads"],
            "key_length": hf.get("head_dim", HEAD_DIM),
            "value_length": hf.get("head_dim", HEAD_DIM),
        }
        said = {f"attention.{name}": one for name, one in own.items()} | said
    for key, value in {**said, **changes}.items():
        add(writer, f"{file.arch}.{key}", value)
    for name, tensor in (weights or stored_weights(file, peer)).items():
        values, kind = tensor.contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0
        if in_blocks and values.ndim > 1 and values.shape[-1] % 32 == 0:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return peer


def test_every_architecture_has_a_file() -> None:
    assert {file.arch for file in FILES.values()} == set(STATES)


@pytest.mark.parametrize("file", [*FILES.values(), *MIXTURES.values()], ids=lambda one: one.case)
def test_logits_are_those_of_the_model(file: File, tmp_path: Path) -> None:
    text = random_text(40)
    peer = write(tmp_path / "m.gguf", file)
    got = logits_of(tmp_path / "m.gguf", tmp_path / "home", text)
    torch.testing.assert_close(got, peer.logits(text), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "fields", "values"),
    [
        ("mamba", {"intermediate_size": 192}, {"ssm.inner_size": 192}),
        ("mamba2", {"num_heads": 12}, {"ssm.inner_size": 192, "ssm.time_step_rank": 12}),
        ("jamba", {}, {"ssm.inner_size": 192}),
        ("nemotron_h_moe", {}, {}),
    ],
)
def test_blocks_are_placed_like_numbers(
    name: str, fields: dict[str, Any], values: dict[str, Any], tmp_path: Path
) -> None:
    file = {**MIXTURES, **FILES}[name]
    file = replace(file, fields=file.fields | fields, values=file.values | values)
    check_blocks(file, tmp_path)


def check_blocks(file: File, tmp_path: Path) -> None:
    """Logits with the blocks of a quantised file are those with its numbers."""
    path, home, text = tmp_path / "m.gguf", tmp_path / "home", random_text(20)
    write(path, replace(file, fields=file.fields | {"hidden_size": 96}), in_blocks=True)
    files = fetch_model(str(path), home=home)
    found = dict(iterate_blocks(files, torch.float32))
    assert any(isinstance(one, QuantizedWeight) for one in found.values())
    got = logits_of(path, home, text, in_blocks=True)
    torch.testing.assert_close(got, logits_of(path, home, text), atol=2e-3, rtol=0)


def test_rates_keep_their_precision(tmp_path: Path) -> None:
    file = FILES["mamba2"]
    peer = write(tmp_path / "m.gguf", file)
    files = fetch_model(str(tmp_path / "m.gguf"), home=tmp_path / "home")
    found = dict(iterate(files, torch.bfloat16))
    name = "backbone.layers.0.mixer.A_log"
    torch.testing.assert_close(found[name], peer.weights[name], atol=1e-5, rtol=0)


def test_rates_that_are_not_negative_are_refused(tmp_path: Path) -> None:
    file = FILES["mamba2"]
    weights = stored_weights(file, peer_of(file))
    weights["blk.0.ssm_a"] = weights["blk.0.ssm_a"].abs()
    write(tmp_path / "m.gguf", file, weights=weights)
    with pytest.raises(WeightError, match="A_log must be made of negative numbers"):
        logits_of(tmp_path / "m.gguf", tmp_path / "home", [1])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mamba2", {"ssm.time_step_rank": 7}, "96 state space channels .* for 7 heads"),
        ("nemotron_h", {"attention.head_count_kv": [0, 2]}, "has 2 numbers"),
        ("jamba", {"attention.head_count_kv": [2, 2, 0, 2]}, "do not come once in a period"),
        ("granitehybrid", {"rope.dimension_count": 16}, "rotates a part of each head"),
    ],
)
def test_files_that_are_not_understood_are_refused(
    name: str, changes: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "m.gguf", {**MIXTURES, **FILES}[name], **changes)
    with pytest.raises(ModelSourceError, match=message):
        logits_of(tmp_path / "m.gguf", tmp_path / "home", [1])
