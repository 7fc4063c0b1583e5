"""Flux.1 beside diffusers: every step's latents, and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext as kontext

from sapwood.base.errors import InvalidRequest
from sapwood.pipelines import flux as ours
from sapwood.pipelines.components import ComponentFolder, Precisions
from sapwood.pipelines.flux import FluxFillPipeline, FluxKontextPipeline, FluxPipeline
from sapwood.pipelines.interface import PictureRequest
from tests import painting_models
from tests.pipelines.beside_diffusers import alone, assert_equal, begun, by_diffusers, together

COMMON = {"prompt": "a red fox", "height": 36, "width": 20, "num_inference_steps": 3}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"guidance_scale": 4.5, "max_sequence_length": 24},
    "wide": {"height": 16, "width": 52, "max_sequence_length": 512},
    "true guidance": {
        "negative_prompt": "blurred",
        "true_cfg_scale": 3.0,
        "max_sequence_length": 24,
    },
}


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, FluxPipeline]:
    peer = painting_models.flux(has_guidance=request.param)
    folder = painting_models.saved(peer, tmp_path_factory.mktemp("flux"))
    return peer, FluxPipeline(ComponentFolder.open(folder), Precisions())


@pytest.mark.parametrize("case", CASES)
def test_each_step_equals_diffusers(case: str, pair: tuple[Any, FluxPipeline]) -> None:
    peer, pipeline = pair
    arguments = COMMON | CASES[case]
    got = alone(pipeline, PictureRequest(seed=5, **arguments))
    assert_equal(got, by_diffusers(peer, 5, **arguments))


def test_pictures_at_different_timesteps_equal_each_alone(pair: tuple[Any, FluxPipeline]) -> None:
    _, pipeline = pair
    requests = [
        PictureRequest(seed=seed, **(COMMON | arguments))
        for seed, arguments in enumerate([*CASES.values(), {"num_inference_steps": 5}])
    ]
    for request, got in zip(requests, together(pipeline, requests), strict=True):
        assert_equal(got, alone(pipeline, request), atol=2e-5)


@pytest.fixture(scope="module")
def small_kontext(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, FluxKontextPipeline]:
    peer = painting_models.flux(pipeline="FluxKontextPipeline")
    folder: Path = painting_models.saved(peer, tmp_path_factory.mktemp("kontext"))
    return peer, FluxKontextPipeline(ComponentFolder.open(folder), Precisions())


@pytest.mark.parametrize("shape", [(30, 51), (64, 17), None])
def test_kontext_equals_diffusers(
    shape: tuple[int, int] | None,
    small_kontext: tuple[Any, FluxKontextPipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peer, pipeline = small_kontext
    sizes = [(24, 56), (36, 36), (56, 24)]
    monkeypatch.setattr(kontext, "PREFERRED_KONTEXT_RESOLUTIONS", sizes)
    monkeypatch.setattr(ours, "KONTEXT_SIZES", sizes)
    monkeypatch.setattr(FluxKontextPipeline, "usual_latents", 16)
    seen: dict[str, Any] = {}
    images: tuple[torch.Tensor, ...] = ()
    if shape is not None:
        generator = torch.Generator().manual_seed(1)
        images = (torch.randint(0, 256, (*shape, 3), generator=generator).to(torch.uint8),)
        seen["image"] = ours_to_pil(images[0])
    arguments = COMMON | {"max_sequence_length": 24}
    want = by_diffusers(peer, 5, max_area=32**2, **seen, **arguments)
    got = alone(pipeline, PictureRequest(seed=5, images=images, **arguments))
    assert_equal(got, want)


@pytest.mark.parametrize(
    "fields", [{}, {"height": 24, "width": 40, "strength": 0.7}], ids=["whole", "strength"]
)
def test_fill_equals_diffusers(
    fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    peer = painting_models.flux(pipeline="FluxFillPipeline")
    folder: Path = painting_models.saved(peer, tmp_path_factory.mktemp("fill"))
    pipeline = FluxFillPipeline(ComponentFolder.open(folder), Precisions())
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (36, 28, 3), generator=generator).to(torch.uint8)
    mask = torch.zeros(36, 28, dtype=torch.uint8)
    mask[5:20, 9:] = 255
    arguments = COMMON | {"height": 36, "width": 28, "max_sequence_length": 24} | fields
    pictures = {"image": ours_to_pil(pixels), "mask_image": ours_to_pil(mask)}
    want = by_diffusers(peer, 5, **pictures, **arguments)
    request = PictureRequest(seed=5, images=(pixels,), mask=mask, **arguments)
    assert_equal(alone(pipeline, request), want)
    with pytest.raises(InvalidRequest, match="wants a picture, and a mask"):
        begun(pipeline, PictureRequest(seed=5, images=(pixels,), **arguments))


def ours_to_pil(pixels: torch.Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"height": 2}, "too small"),
        ({"num_inference_steps": -1}, "num_inference_steps"),
        ({"max_sequence_length": 600}, "max_sequence_length"),
        ({"images": (torch.zeros(8, 8, 3, dtype=torch.uint8),)}, "prompt alone"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    fields: dict[str, Any], said: str, pair: tuple[Any, FluxPipeline]
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        begun(pair[1], PictureRequest(**(COMMON | fields)))
