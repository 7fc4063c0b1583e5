"""A GGUF file of DeepSeek's architecture gives the logits of the model that it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.base.errors import ModelSourceError, WeightError
from tests.models.lm.cases import LATENT, YARN
from tests.models.lm.peer import random_text
from tests.models.loader.test_gguf_mixtures import logits_of
from tests.models.loader.test_gguf_states import File, check_blocks, peer_of, stored_weights, write

RANK, ROPE, NOPE, VALUES = (
    LATENT[name] for name in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
)
SIZES = {
    "attention.kv_lora_rank": RANK,
    "rope.dimension_count": ROPE,
    "rope.freq_base": 1e4,
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_feed_forward_length": 40,
    "expert_shared_count": 2,
    "expert_weights_scale": 1.5,
}
ROWS = {
    "attention.head_count_kv": 1,
    "attention.key_length": RANK + ROPE,
    "attention.value_length": RANK,
    "attention.key_length_mla": NOPE + ROPE,
    "attention.value_length_mla": VALUES,
}
"""As newer files say the sizes: those of the cache's rows first."""
WHOLE = {
    "attention.head_count_kv": 6,
    "attention.key_length": NOPE + ROPE,
    "attention.value_length": VALUES,
}
GROUPED = {"expert_group_count": 4, "expert_group_used_count": 2}
MAGNITUDES = {"mscale": 0.9, "mscale_all_dim": 0.9}
SCALED = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
    "rope.scaling.yarn_log_multiplier": 0.09,
}


def cut(weights: dict[str, Tensor], hf: Mapping[str, Any]) -> None:
    """Keys and values are made by a matrix each; that of keys is stored the other way around."""
    for name in [name for name in weights if "kv_b_proj" in name]:
        layer = name.split(".")[2]
        nope = hf["qk_nope_head_dim"]
        heads = weights.pop(name).view(-1, nope + hf["v_head_dim"], hf["kv_lora_rank"])
        weights[f"blk.{layer}.attn_k_b.weight"] = heads[:, :nope].transpose(1, 2)
        weights[f"blk.{layer}.attn_v_b.weight"] = heads[:, nope:]


FILES = {
    "v3": File(
        "deepseek_v3",
        "deepseek2",
        1,
        {
            **SIZES, **ROWS, **GROUPED, **SCALED, "attention.q_lora_rank": 40,
            "leading_dense_block_count": 1, "expert_gating_func": 2, "expert_weights_norm": True,
        },
        {"rope_parameters": YARN | MAGNITUDES, "norm_topk_prob": True},
        cut,
    ),
    "v3, one matrix": File(
        "deepseek_v3, one group",
        "deepseek2",
        1,
        {**SIZES, **WHOLE, "attention.q_lora_rank": 40, "expert_weights_norm": True},
        {"norm_topk_prob": True},
    ),
    "v2": File(
        "deepseek_v2",
        "deepseek2",
        1,
        {**SIZES, **ROWS, **GROUPED, **SCALED, "attention.q_lora_rank": 40},
        {"rope_parameters": YARN | MAGNITUDES},
        cut,
    ),
    "v2, lite": File(
        "deepseek_v2, lite",
        "deepseek2",
        1,
        {**SIZES, **WHOLE, "leading_dense_block_count": 1, "expert_gating_func": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_logits_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    text = random_text(80)
    peer = write(tmp_path / "m.gguf", FILES[name])
    got = logits_of(tmp_path / "m.gguf", tmp_path / "home", text)
    torch.testing.assert_close(got, peer.logits(text), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["v3", "v2, lite"])
def test_blocks_are_placed_like_numbers(name: str, tmp_path: Path) -> None:
    check_blocks(FILES[name], tmp_path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((6, NOPE), "must have three dimensions"), ((5, RANK, NOPE), "not halves of one matrix")],
)
def test_halves_that_do_not_fit_are_refused(
    shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    file = FILES["v2"]
    weights = stored_weights(file, peer_of(file))
    weights["blk.1.attn_k_b.weight"] = torch.ones(shape)
    write(tmp_path / "m.gguf", file, weights=weights)
    with pytest.raises(WeightError, match=message):
        logits_of(tmp_path / "m.gguf", tmp_path / "home", [1])


def test_a_half_alone_is_refused(tmp_path: Path) -> None:
    file = FILES["v2"]
    weights = stored_weights(file, peer_of(file))
    del weights["blk.1.attn_v_b.weight"]
    write(tmp_path / "m.gguf", file, weights=weights)
    with pytest.raises(WeightError, match=r"a tensor blk\.1\.attn_k_b\.weight, which sapwood"):
        logits_of(tmp_path / "m.gguf", tmp_path / "home", [1])


def test_a_bias_for_a_softmax_is_refused(tmp_path: Path) -> None:
    file = replace(FILES["v3"], values={**FILES["v3"].values, "expert_gating_func": 1})
    write(tmp_path / "m.gguf", file)
    with pytest.raises(ModelSourceError, match="a bias for the choice of experts by a softmax"):
        logits_of(tmp_path / "m.gguf", tmp_path / "home", [1])
