"""Flux.2 Klein beside diffusers: every step's latents, and the picture."""

from __future__ import annotations

from typing import Any

import pytest

from sapwood.pipelines.components import Precisions
from sapwood.pipelines.flux2 import Flux2KleinPipeline
from sapwood.pipelines.interface import PictureRequest
from sapwood.pipelines.registry import load_pipeline
from tests import painting_models
from tests.pipelines.beside_diffusers import alone, assert_equal, by_diffusers, together

COMMON = {
    "prompt": "a red fox",
    "height": 36,
    "width": 20,
    "num_inference_steps": 3,
    "max_sequence_length": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 3.0},
    "usual": {"height": 32, "width": 64, "num_inference_steps": 2},
    "one pass": {"guidance_scale": 1.0, "prompt": "x" * 100},
}


@pytest.fixture(scope="module", params=[False, True], ids=["base", "distilled"])
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Flux2KleinPipeline]:
    peer = painting_models.flux2_klein(is_distilled=request.param)
    folder = painting_models.saved(peer, tmp_path_factory.mktemp("flux2"))
    found = load_pipeline(folder, Precisions())
    assert isinstance(found, Flux2KleinPipeline)
    found.text_layers = (1, 2, 3)
    return peer, found


@pytest.mark.parametrize("case", CASES)
def test_each_step_equals_diffusers(case: str, pair: tuple[Any, Flux2KleinPipeline]) -> None:
    peer, pipeline = pair
    arguments = COMMON | CASES[case]
    got = alone(pipeline, PictureRequest(seed=5, **arguments))
    assert_equal(got, by_diffusers(peer, 5, text_encoder_out_layers=(1, 2, 3), **arguments))


def test_pictures_at_different_timesteps_equal_each_alone(
    pair: tuple[Any, Flux2KleinPipeline],
) -> None:
    _, pipeline = pair
    requests = [
        PictureRequest(seed=seed, **(COMMON | arguments))
        for seed, arguments in enumerate(CASES.values())
    ]
    for request, got in zip(requests, together(pipeline, requests), strict=True):
        assert_equal(got, alone(pipeline, request), atol=2e-5)
