"""Where --enable-deterministic-inference holds on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sapwood.app.building.deterministic import check_fixed_on_gpu
from sapwood.base.errors import ConfigError
from sapwood.models.registry import read_decoder
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.resolve import resolve
from tests.models.lm.cases import peer_of
from tests.schema.config.test_resolve import GPU, MODEL

ON: dict[str, Any] = {"enable_deterministic_inference": True}


def check(case: str, kernels: str = "triton", generates: bool = True, **options: Any) -> None:
    asked = EngineConfig.of({"model": "m", **options})
    config, _ = resolve(asked, GPU, MODEL)
    shape = read_decoder(peer_of(case).hf_config)
    check_fixed_on_gpu(config, shape, kernels, generates=generates)


@pytest.mark.parametrize("case", ["gemma3", "gpt_oss", "mixtral"])
def test_keys_and_values_windows_and_experts_hold(case: str) -> None:
    check(case, **ON)


@pytest.mark.parametrize(
    ("case", "options", "why"),
    [
        ("deepseek_v3", {}, "layers with a latent cache"),
        ("qwen3_next", {}, "layers with a state cache"),
        ("gemma3", {"kernels": "torch"}, "kernels torch choose"),
        ("gemma3", {"generates": False}, "embedding models"),
        ("gemma3", {"speculative_algorithm": "NGRAM"}, "drafts in a tree"),
        ("gemma3", {"tp_size": 2}, "ranks add their parts"),
    ],
)
def test_what_does_not_hold_is_refused_by_name(
    case: str, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=f"does not hold on cuda.*{why}"):
        check(case, **ON, **options)
    check(case, **options)


def test_cpus_have_exact_products_instead() -> None:
    asked = EngineConfig.of({"model": "m", **ON})
    config, _ = resolve(asked, replace(GPU, device="cpu"), MODEL)
    shape = read_decoder(peer_of("qwen3_next").hf_config)
    check_fixed_on_gpu(config, shape, "cpu", generates=True)
