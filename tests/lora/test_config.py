"""adapter_config.json: what is read, and what is refused by its name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sapwood.base.errors import ConfigError
from sapwood.lora.config import MAX_CONFIG_BYTES, adapter_config, read_config

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
PATH = "model.layers.1.self_attn.q_proj"


def test_scaling() -> None:
    assert adapter_config(PLAIN, "it").scaling(PATH, 8) == 2.0
    rslora = adapter_config({**PLAIN, "use_rslora": True}, "it")
    assert rslora.scaling(PATH, 16) == 16 / math.sqrt(16)


@pytest.mark.parametrize(("rank", "alpha"), [(16, 32), (64, 128), (256, 256)])
def test_scaling_of_sglangs_scenario(rank: int, alpha: int) -> None:
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
    plain = adapter_config(values, "it").scaling(PATH, rank)
    rslora = adapter_config({**values, "use_rslora": True}, "it").scaling(PATH, rank)
    assert (plain, rslora) == (alpha / rank, alpha / math.sqrt(rank))


@pytest.mark.parametrize(
    ("key", "is_meant"),
    [
        ("q_proj", True),
        ("self_attn.q_proj", True),
        (PATH, True),
        (f"^{PATH}", True),
        (r"layers\\.1\\.self_attn\\.q_proj", True),
        ("1.self_attn.q_proj", True),
        ("_proj", False),
        ("^q_proj", False),
        ("k_proj", False),
        ("layers.1", False),
    ],
)
def test_patterns_name_ends_of_paths_as_peft_does(key: str, is_meant: bool) -> None:
    key = key.replace("\\\\", "\\")
    config = adapter_config({**PLAIN, "rank_pattern": {key: 3}, "alpha_pattern": {key: 32}}, "it")
    assert config.rank(PATH) == (3 if is_meant else 8)
    assert config.scaling(PATH, 8) == (4.0 if is_meant else 2.0)
    assert config.max_rank == 8


def test_what_peft_writes_besides_is_no_matter() -> None:
    values = {
        **PLAIN,
        "auto_mapping": None,
        "base_model_name_or_path": "somewhere",
        "bias": "none",
        "inference_mode": True,
        "layers_to_transform": [1],
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "a_field_of_tomorrow": 3,
    }
    assert adapter_config(values, "it").r == 8


@pytest.mark.parametrize(
    "field",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"trainable_token_indices": [1]},
        {"peft_type": "LOHA"},
    ],
)
def test_what_is_not_done_is_refused_by_name(field: dict[str, Any]) -> None:
    (name,) = field
    with pytest.raises(ConfigError, match=f"^it: {name} is"):
        adapter_config({**PLAIN, **field}, "it")


@pytest.mark.parametrize(
    "values",
    [
        {"lora_alpha": 16},
        {**PLAIN, "r": "eight"},
        {**PLAIN, "r": 0},
        {**PLAIN, "lora_alpha": float("inf")},
        {**PLAIN, "rank_pattern": {"q_proj": -1}},
        {**PLAIN, "alpha_pattern": {"(a+)+$": 1}},
        {**PLAIN, "alora_invocation_tokens": [-1]},
        {**PLAIN, "alora_invocation_tokens": [1] * 1025},
        {**PLAIN, "rank_pattern": {f"l{i}": 1 for i in range(10_001)}},
    ],
)
def test_nonsense_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^it: "):
        adapter_config(values, "it")


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no LoRA adapter"):
        read_config(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text("[]")
    with pytest.raises(ConfigError, match="is no JSON object"):
        read_config(tmp_path)
    file.write_text(json.dumps(PLAIN) + " " * MAX_CONFIG_BYTES)
    with pytest.raises(ConfigError, match="has over"):
        read_config(tmp_path)
    file.write_text(json.dumps(PLAIN))
    assert read_config(tmp_path).lora_alpha == 16
