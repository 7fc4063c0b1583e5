"""A GGUF file of each architecture with gated delta nets gives the logits of the model that it was
made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.base.errors import ModelSourceError, WeightError
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.models.loader.gguf import iterate_blocks
from sapwood.store import fetch_model
from sapwood.store.gguf_delta import DENSE, MIXTURES
from tests.models.lm.peer import random_text
from tests.models.loader.test_gguf_latent import cut
from tests.models.loader.test_gguf_mixtures import logits_of
from tests.models.loader.test_gguf_states import (
    File,
    Weights,
    check_blocks,
    peer_of,
    sizes,
    stored_weights,
    write,
)

KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM = 2, 4, 12, 20
SIZES = {**sizes(4, HEADS * VALUE_DIM, KEY_DIM, HEADS, KEY_HEADS), "rope.dimension_count": 8}
EXPERTS = {
    "expert_count": 6,
    "expert_used_count": 2,
    "expert_feed_forward_length": 40,
    "expert_shared_feed_forward_length": 56,
}
TILED = ("in_proj_z", "in_proj_b", "in_proj_a", "A_log", "dt_bias")


def tiled(x: Tensor, dim: int = 0) -> Tensor:
    """Value heads in the order in which llama.cpp repeats key heads."""
    heads = x.unflatten(dim, (KEY_HEADS, HEADS // KEY_HEADS, -1))
    return heads.transpose(dim, dim + 1).flatten(dim, dim + 2)


def norms(weights: Weights, hf: Mapping[str, Any]) -> None:
    for name in weights:
        if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            weights[name] = weights[name] + 1.0


def tiles(weights: Weights, hf: Mapping[str, Any]) -> None:
    """What the converter does to Qwen3.5."""
    norms(weights, hf)
    keys = 2 * KEY_HEADS * hf["linear_key_head_dim"]
    for name, tensor in weights.items():
        if "linear_attn.in_proj_qkv" in name or "linear_attn.conv1d" in name:
            weights[name] = torch.cat((tensor[:keys], tiled(tensor[keys:])))
        elif "linear_attn.out_proj" in name:
            weights[name] = tiled(tensor, dim=1)
        elif "linear_attn" in name and any(part in name for part in TILED):
            weights[name] = tiled(tensor)


def splits(weights: Weights, hf: Mapping[str, Any]) -> None:
    """What the converter does to Qwen3-Next."""
    norms(weights, hf)
    values = HEADS // KEY_HEADS * VALUE_DIM
    for name in [name for name in weights if "in_proj_qkvz" in name]:
        of_heads = weights.pop(name).unflatten(0, (KEY_HEADS, -1))
        *qkv, gate = of_heads.split((KEY_DIM, KEY_DIM, values, values), dim=1)
        layer = name.split(".")[2]
        weights[f"blk.{layer}.attn_qkv.weight"] = torch.cat([one.flatten(0, 1) for one in qkv])
        weights[f"blk.{layer}.attn_gate.weight"] = gate.flatten(0, 1)


def whole(weights: Weights, hf: Mapping[str, Any]) -> None:
    """As `splits` was in 2025."""
    norms(weights, hf)
    for name in [name for name in weights if "in_proj_qkvz" in name]:
        weights[f"blk.{name.split('.')[2]}.ssm_in.weight"] = weights.pop(name)


def kimi(weights: Weights, hf: Mapping[str, Any]) -> None:
    cut(weights, hf)
    for name in list(weights):
        if found := re.search(r"layers\.(\d+)\.self_attn\.([qkv])_conv1d", name):
            rows = weights.pop(name)[None]
            weights[f"blk.{found[1]}.ssm_conv1d_{found[2]}.weight"] = rows


NEXT = File(
    "qwen3_next",
    "qwen3next",
    1,
    {**SIZES, **EXPERTS, "full_attention_interval": 2, "feed_forward_length": 100},
    {"mlp_only_layers": []},
    splits,
)
FILES = {
    "qwen35": File(
        "qwen3_5",
        "qwen35",
        1,
        {
            **SIZES, "ssm.conv_kernel": 3, "rope.dimension_sections": [2, 1, 1, 0],
            "block_count": 3, "nextn_predict_layers": 1,
            "attention.recurrent_layers": [True, False, False],
        },
        {},
        tiles,
    ),
    "qwen35, a value head per key head": File(
        "qwen3_5",
        "qwen35",
        1,
        {
            **SIZES, "ssm.conv_kernel": 3, "ssm.group_count": HEADS, "full_attention_interval": 2,
        },
        {"linear_num_key_heads": HEADS},
        norms,
    ),
    "qwen35moe": File(
        "qwen3_5_moe", "qwen35moe", 1, {**SIZES, **EXPERTS, "full_attention_interval": 2}, {}, tiles
    ),
    "qwen3next": NEXT,
    "qwen3next of 2025": replace(NEXT, change=whole),
    "kimi-linear": File(
        "kimi_linear",
        "kimi-linear",
        1,
        {
            "ssm.conv_kernel": 4, "kda.head_dim": 16,
            "attention.head_count": 6, "attention.head_count_kv": [0, 1],
            "attention.kv_lora_rank": 32, "rope.dimension_count": 32,
            "attention.key_length": 64, "attention.value_length": 72,
            "attention.key_length_mla": 44, "attention.value_length_mla": 20,
            "leading_dense_block_count": 1, "expert_count": 6, "expert_used_count": 2,
            "expert_shared_count": 1, "expert_feed_forward_length": 40, "expert_gating_func": 2,
            "expert_weights_scale": 2.446,
        },
        {"linear_num_heads": 6},
        kimi,
    ),
}  # fmt: skip


def test_every_architecture_has_a_file() -> None:
    assert {file.arch for file in FILES.values()} == {*DENSE, *MIXTURES}


@pytest.mark.parametrize("name", FILES)
def test_logits_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    text = random_text(40)
    peer = write(tmp_path / "m.gguf", FILES[name])
    got = logits_of(tmp_path / "m.gguf", tmp_path / "home", text)
    torch.testing.assert_close(got, peer.logits(text), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["qwen35", "qwen3next", "kimi-linear"])
def test_blocks_are_placed_like_numbers(name: str, tmp_path: Path) -> None:
    check_blocks(FILES[name], tmp_path)


@pytest.mark.parametrize(("value_dim", "stays"), [(32, True), (16, False)])
def test_a_block_within_a_head_stays_a_block(value_dim: int, stays: bool, tmp_path: Path) -> None:
    """Columns of the output projection are put in order block by block, where blocks allow it."""
    file = FILES["qwen35"]
    file = replace(
        file,
        fields={"linear_value_head_dim": value_dim, "hidden_size": 96},
        values=file.values | {"ssm.inner_size": HEADS * value_dim},
    )
    write(tmp_path / "m.gguf", file, in_blocks=True)
    files = fetch_model(str(tmp_path / "m.gguf"), home=tmp_path / "home")
    found = dict(iterate_blocks(files, torch.float32))
    out = found["model.layers.0.linear_attn.out_proj.weight"]
    assert isinstance(out, QuantizedWeight) == stays
    check_blocks(file, tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ssm.time_step_rank": 3}, "80 values of linear attention .* for 3 heads"),
        ({"ssm.group_count": 3}, "and 3 key heads"),
        ({"attention.recurrent_layers": [True], "full_attention_interval": 0}, "not 1 or more"),
    ],
)
def test_heads_and_layers_that_cannot_be_are_refused(
    values: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "m.gguf", FILES["qwen35"], **values)
    with pytest.raises(ModelSourceError, match=message):
        logits_of(tmp_path / "m.gguf", tmp_path / "home", [1])


def test_a_tensor_that_does_not_have_the_heads_is_refused(tmp_path: Path) -> None:
    file = FILES["qwen35"]
    weights = stored_weights(file, peer_of(file))
    weights["blk.0.attn_gate.weight"] = weights["blk.0.attn_gate.weight"][:-1]
    write(tmp_path / "m.gguf", file, weights=weights)
    with pytest.raises(WeightError, match=r"attn_gate.weight .* cannot have 4 heads"):
        logits_of(tmp_path / "m.gguf", tmp_path / "home", [1])
