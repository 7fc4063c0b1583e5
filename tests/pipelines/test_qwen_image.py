"""Qwen-Image beside diffusers: every step's latents, and the picture."""

from __future__ import annotations

from typing import Any

import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.pipelines.components import Precisions
from sapwood.pipelines.interface import PictureRequest
from sapwood.pipelines.qwen_image import QwenImagePipeline
from sapwood.pipelines.registry import load_pipeline
from tests import painting_models
from tests.pipelines.beside_diffusers import alone, assert_equal, begun, by_diffusers, together

COMMON = {"prompt": "a red fox", "height": 40, "width": 24, "num_inference_steps": 3}
CASES: dict[str, dict[str, Any]] = {
    "one pass": {},
    "wide": {"height": 24, "width": 61, "num_inference_steps": 2},
    "true guidance": {"negative_prompt": "blurred", "true_cfg_scale": 3.0},
    "usual guidance": {"negative_prompt": " ", "prompt": "x" * 600},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, QwenImagePipeline]:
    peer = painting_models.qwen_image()
    folder = painting_models.saved(peer, tmp_path_factory.mktemp("qwen"))
    found = load_pipeline(folder, Precisions())
    assert isinstance(found, QwenImagePipeline)
    return peer, found


@pytest.mark.parametrize("case", CASES)
def test_each_step_equals_diffusers(case: str, pair: tuple[Any, QwenImagePipeline]) -> None:
    peer, pipeline = pair
    arguments = COMMON | CASES[case]
    got = alone(pipeline, PictureRequest(seed=5, **arguments))
    assert_equal(got, by_diffusers(peer, 5, **arguments))


def test_pictures_at_different_timesteps_equal_each_alone(
    pair: tuple[Any, QwenImagePipeline],
) -> None:
    _, pipeline = pair
    requests = [
        PictureRequest(seed=seed, **(COMMON | arguments))
        for seed, arguments in enumerate(CASES.values())
    ]
    for request, got in zip(requests, together(pipeline, requests), strict=True):
        assert_equal(got, alone(pipeline, request), atol=2e-5)


def test_a_negative_prompt_without_a_second_pass_is_refused(
    pair: tuple[Any, QwenImagePipeline],
) -> None:
    with pytest.raises(InvalidRequest, match="second pass"):
        begun(pair[1], PictureRequest(negative_prompt="blurred", true_cfg_scale=1.0, **COMMON))
