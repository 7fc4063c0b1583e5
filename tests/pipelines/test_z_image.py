"""Z-Image beside diffusers: every step's latents, and the picture."""

from __future__ import annotations

from typing import Any

import pytest

from sapwood.pipelines.components import Precisions
from sapwood.pipelines.interface import PictureRequest
from sapwood.pipelines.registry import load_pipeline
from sapwood.pipelines.z_image import ZImagePipeline, whole_of
from tests import painting_models
from tests.pipelines.beside_diffusers import alone, assert_equal, by_diffusers, together

COMMON = {"prompt": "a red fox", "height": 36, "width": 20, "num_inference_steps": 3}
CASES: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 3.0, "negative_prompt": "blurred"},
    "usual": {"height": 32, "width": 64, "num_inference_steps": 2},
    "turbo": {"guidance_scale": 0.0, "prompt": "x" * 400},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ZImagePipeline]:
    peer = painting_models.z_image()
    folder = painting_models.saved(peer, tmp_path_factory.mktemp("z"))
    found = load_pipeline(folder, Precisions())
    assert isinstance(found, ZImagePipeline)
    return peer, found


@pytest.mark.parametrize("case", CASES)
def test_each_step_equals_diffusers(case: str, pair: tuple[Any, ZImagePipeline]) -> None:
    peer, pipeline = pair
    arguments = COMMON | CASES[case]
    tokens, picture = alone(pipeline, PictureRequest(seed=5, **arguments))
    size = (arguments["height"] // 4 * 2, arguments["width"] // 4 * 2)
    got = ([whole_of(own, size) for own in tokens], picture)
    assert_equal(got, by_diffusers(peer, 5, **arguments))


def test_pictures_at_different_timesteps_equal_each_alone(pair: tuple[Any, ZImagePipeline]) -> None:
    _, pipeline = pair
    requests = [
        PictureRequest(seed=seed, **(COMMON | arguments))
        for seed, arguments in enumerate(CASES.values())
    ]
    for request, got in zip(requests, together(pipeline, requests), strict=True):
        assert_equal(got, alone(pipeline, request), atol=2e-5)
