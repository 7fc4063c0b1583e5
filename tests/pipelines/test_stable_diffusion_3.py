"""Stable Diffusion 3 and 3.5 beside diffusers: every step's latents, and the picture."""

from __future__ import annotations

from typing import Any

import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.pipelines.components import Precisions
from sapwood.pipelines.interface import PictureRequest
from sapwood.pipelines.pictures import unpack
from sapwood.pipelines.registry import load_pipeline
from sapwood.pipelines.stable_diffusion_3 import StableDiffusion3Pipeline
from tests import painting_models
from tests.pipelines.beside_diffusers import alone, assert_equal, begun, by_diffusers, together

COMMON = {
    "prompt": "a red fox",
    "height": 36,
    "width": 20,
    "num_inference_steps": 3,
    "max_sequence_length": 24,
}
CASES: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 3.0, "negative_prompt": "blurred"},
    "usual": {"height": 32, "width": 64, "num_inference_steps": 2},
    "one pass": {"guidance_scale": 1.0},
}


@pytest.fixture(scope="module", params=[True, False], ids=["3.5", "3 without T5"])
def pair(
    request: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, StableDiffusion3Pipeline]:
    peer = painting_models.stable_diffusion_3(is_dual=request.param, has_t5=request.param)
    folder = painting_models.saved(peer, tmp_path_factory.mktemp("sd3"))
    found = load_pipeline(folder, Precisions())
    assert isinstance(found, StableDiffusion3Pipeline)
    return peer, found


@pytest.mark.parametrize("case", CASES)
def test_each_step_equals_diffusers(case: str, pair: tuple[Any, StableDiffusion3Pipeline]) -> None:
    peer, pipeline = pair
    arguments = COMMON | CASES[case]
    tokens, picture = alone(pipeline, PictureRequest(seed=5, **arguments))
    size = (arguments["height"] // 2, arguments["width"] // 2)
    got = ([unpack(own, size) for own in tokens], picture)
    assert_equal(got, by_diffusers(peer, 5, **arguments))


def test_pictures_at_different_timesteps_equal_each_alone(
    pair: tuple[Any, StableDiffusion3Pipeline],
) -> None:
    _, pipeline = pair
    requests = [
        PictureRequest(seed=seed, **(COMMON | arguments))
        for seed, arguments in enumerate(CASES.values())
    ]
    for request, got in zip(requests, together(pipeline, requests), strict=True):
        assert_equal(got, alone(pipeline, request), atol=2e-5)


def test_a_picture_beyond_the_known_positions_is_refused(
    pair: tuple[Any, StableDiffusion3Pipeline],
) -> None:
    with pytest.raises(InvalidRequest, match="at most 20 patches"):
        begun(pair[1], PictureRequest(**(COMMON | {"height": 200})))
