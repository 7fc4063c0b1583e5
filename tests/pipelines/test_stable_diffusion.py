"""Stable Diffusion 1.5 and XL beside diffusers: every step's latents, and the picture."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from sapwood.base.errors import InvalidRequest
from sapwood.pipelines.components import Precisions
from sapwood.pipelines.interface import PictureRequest
from sapwood.pipelines.registry import load_pipeline
from sapwood.pipelines.stable_diffusion import StableDiffusionPipeline
from tests import painting_models
from tests.pipelines.beside_diffusers import alone, assert_equal, begun, by_diffusers, together

# diffusers' own, where it hands numbers from torch to numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

COMMON = {"prompt": "a red fox", "height": 32, "width": 24, "num_inference_steps": 4}
CASES: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 3.0, "negative_prompt": "blurred"},
    "usual": {"height": 24, "width": 40},
    "one pass": {"guidance_scale": 1.0},
    # Strong guidance in two steps would multiply rounding by some hundred.
    "long": {"prompt": "x" * 60, "num_inference_steps": 3, "guidance_scale": 3.0},
}
MAKERS: dict[str, Any] = {
    "pndm": painting_models.stable_diffusion,
    "ddim": lambda: painting_models.stable_diffusion("DDIMScheduler"),
    "dpm": lambda: painting_models.stable_diffusion("DPMSolverMultistepScheduler"),
    "xl": painting_models.stable_diffusion_xl,
    "xl ancestral": lambda: painting_models.stable_diffusion_xl("EulerAncestralDiscreteScheduler"),
    "xl unipc": lambda: painting_models.stable_diffusion_xl("UniPCMultistepScheduler"),
}


@pytest.fixture(scope="module", params=MAKERS)
def pair(
    request: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, StableDiffusionPipeline]:
    peer = MAKERS[request.param]()
    folder = painting_models.saved(peer, tmp_path_factory.mktemp("sd"))
    found = load_pipeline(folder, Precisions())
    assert isinstance(found, StableDiffusionPipeline)
    return peer, found


@pytest.mark.parametrize("case", CASES)
def test_each_step_equals_diffusers(case: str, pair: tuple[Any, StableDiffusionPipeline]) -> None:
    peer, pipeline = pair
    arguments = COMMON | CASES[case]
    got = alone(pipeline, PictureRequest(seed=5, **arguments))
    assert_equal(got, by_diffusers(peer, 5, **arguments))


@pytest.mark.parametrize("strength", [0.5, 1.0, None])
def test_a_changed_picture_equals_diffusers(
    strength: float | None, pair: tuple[Any, StableDiffusionPipeline]
) -> None:
    peer, pipeline = pair
    kind = type(peer).__name__.replace("Pipeline", "Img2ImgPipeline")
    changing = getattr(diffusers, kind)(**changed_components(peer))
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (29, 41, 3), generator=generator).to(torch.uint8)
    arguments: dict[str, Any] = {"prompt": "a red fox", "num_inference_steps": 5}
    if strength is not None:
        arguments["strength"] = strength
    else:
        arguments["num_inference_steps"] = 10
    want = by_diffusers(changing, 5, image=Image.fromarray(pixels.numpy()), **arguments)
    got = alone(pipeline, PictureRequest(seed=5, images=(pixels,), **arguments))
    assert_equal(got, want)


def changed_components(peer: Any) -> dict[str, Any]:
    found = {
        name: part
        for name, part in peer.components.items()
        if name not in ("image_encoder", "feature_extractor", "safety_checker")
    }
    if "XL" in type(peer).__name__:
        return found
    return found | {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def test_pictures_at_different_timesteps_equal_each_alone(
    pair: tuple[Any, StableDiffusionPipeline],
) -> None:
    _, pipeline = pair
    requests = [
        PictureRequest(seed=seed, **(COMMON | arguments))
        for seed, arguments in enumerate(CASES.values())
    ]
    for request, got in zip(requests, together(pipeline, requests), strict=True):
        assert_equal(got, alone(pipeline, request), atol=2e-5)


def test_strength_without_a_picture_is_refused(pair: tuple[Any, StableDiffusionPipeline]) -> None:
    with pytest.raises(InvalidRequest, match="strength"):
        begun(pair[1], PictureRequest(strength=0.5, **COMMON))
