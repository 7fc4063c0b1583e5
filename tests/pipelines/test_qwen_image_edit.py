"""Qwen-Image-Edit and Edit-Plus beside diffusers: every step's latents, and the picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_plus,
)

from sapwood.base.errors import InvalidRequest
from sapwood.pipelines.components import Precisions
from sapwood.pipelines.interface import PictureRequest, Pipeline
from sapwood.pipelines.pictures import as_picture
from sapwood.pipelines.qwen_image_edit import QwenImageEditPipeline
from sapwood.pipelines.registry import load_pipeline
from tests import painting_models
from tests.pipelines.beside_diffusers import alone, assert_equal, begun, by_diffusers, together

COMMON: dict[str, Any] = {"prompt": "make {it} a red fox", "num_inference_steps": 2}
GUIDED = {"negative_prompt": " ", "true_cfg_scale": 3.0}
AREAS = {1024**2: 64**2, 384**2: 48**2}
"""In place of the real ones, which are a million pixels."""


def pictures(*shapes: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randint(0, 256, (*shape, 3), generator=generator).to(torch.uint8) for shape in shapes
    )


@pytest.fixture(scope="module", params=["QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    peer = painting_models.qwen_image_edit(request.param)
    folder = painting_models.saved(peer, tmp_path_factory.mktemp("edit"))
    peer.processor.save_pretrained(folder / "processor")
    found = load_pipeline(folder, Precisions())
    assert isinstance(found, QwenImageEditPipeline)
    found.area, found.read_area = AREAS[found.area], AREAS[found.read_area]
    patch = pytest.MonkeyPatch()
    # Without them transformers 5 gives pictures the positions of text, which the model has not
    # been trained with; diffusers does not pass them on.
    encoder, forward = peer.text_encoder, peer.text_encoder.forward
    picture_id = encoder.config.image_token_id
    patch.setattr(
        encoder,
        "forward",
        lambda input_ids, **fields: forward(
            input_ids, mm_token_type_ids=(input_ids == picture_id).int(), **fields
        ),
    )
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        real = module.calculate_dimensions
        patch.setattr(
            module,
            "calculate_dimensions",
            lambda area, ratio, real=real: real(AREAS[area], ratio),
        )
    yield peer, found
    patch.undo()


def cases(pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    several = pictures((40, 61), (70, 33)) if pipeline.traits.max_input_pictures > 1 else ()
    GUIDED | {"height": 24, "width": 40}
    return {
        "its own size": {"images": pictures((40, 61))},
        "guided, of another size": {
            "images": pictures((64, 30)),
            "height": 24,
            "width": 40,
            **GUIDED,
        },
        "several": {"images": several, **GUIDED},
    }


@pytest.mark.parametrize("case", ["its own size", "guided, of another size", "several"])
def test_each_step_equals_diffusers(case: str, pair: Any) -> None:
    peer, pipeline = pair
    arguments = COMMON | cases(pipeline)[case]
    if not arguments["images"]:
        pytest.skip("it looks at one picture at most")
    got = alone(pipeline, PictureRequest(seed=5, **arguments))
    shown = [as_picture(each) for each in arguments.pop("images")]
    image = shown if pipeline.traits.max_input_pictures > 1 else shown[0]
    assert_equal(got, by_diffusers(peer, 5, image=image, **arguments))


def test_pictures_at_different_timesteps_equal_each_alone(pair: Any) -> None:
    _, pipeline = pair
    requests = [
        PictureRequest(seed=seed, **(COMMON | arguments))
        for seed, arguments in enumerate(cases(pipeline).values())
        if arguments["images"]
    ]
    for request, got in zip(requests, together(pipeline, requests), strict=True):
        assert_equal(got, alone(pipeline, request), atol=2e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "wants a picture"),
        ({"images": pictures((8, 8)) * 9}, "pictures were sent"),
        ({"images": pictures((1, 3000))}, "too long"),
        ({"images": pictures((30, 30)), "prompt": "<|image_pad|>"}, "stands for a picture"),
        ({"images": pictures((30, 30)), "prompt": "x" * 2000}, "tokens with its template"),
        ({"images": pictures((30, 30)), "height": 2, "width": 2}, "too small"),
    ],
)
def test_what_cannot_be_drawn_is_refused(fields: dict[str, Any], said: str, pair: Any) -> None:
    with pytest.raises(InvalidRequest, match=said):
        begun(pair[1], PictureRequest(**(COMMON | fields)))
