"""Wan beside diffusers: every step's latents, and every frame."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sapwood.base.errors import InvalidRequest
from sapwood.pipelines.components import Precisions
from sapwood.pipelines.interface import PictureRequest
from sapwood.pipelines.registry import load_pipeline
from tests import painting_models
from tests.pipelines.beside_diffusers import (
    Drawn,
    alone,
    assert_equal,
    begun,
    keep_steps,
    together,
)

KINDS = ("t2v", "two", "ti2v", "i2v", "two i2v", "ti2v picture")
COMMON = {
    "prompt": "a  red fox &amp; a hare",
    "height": 32,
    "width": 48,
    "num_frames": 9,
    "num_inference_steps": 3,
}
CASES: dict[str, dict[str, Any]] = {
    "guided": {"negative_prompt": "blurred", "guidance_scale": 3.0},
    "one pass": {"guidance_scale": 1.0, "num_frames": 1, "height": 39},
    "long": {"prompt": "x" * 600, "num_frames": 7, "num_inference_steps": 2},
}


def picture() -> Any:
    levels = np.random.default_rng(3).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(levels)


@pytest.fixture(scope="module", autouse=True)
def _without_repair_of_letters() -> Iterator[None]:
    """diffusers' pipeline for pictures cannot do without a package that mends broken letters."""
    from diffusers.pipelines.wan import pipeline_wan_i2v

    with pytest.MonkeyPatch.context() as patch:
        mender = SimpleNamespace(fix_text=lambda text: text)
        patch.setattr(pipeline_wan_i2v, "ftfy", mender, raising=False)
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    found = {}
    for kind in KINDS:
        peer = painting_models.wan(kind)
        folder = painting_models.saved(peer, tmp_path_factory.mktemp("wan"))
        found[kind] = peer, load_pipeline(folder, Precisions())
    return found


def asked(pair: tuple[Any, Any], arguments: dict[str, Any], seed: int = 5) -> PictureRequest:
    if pair[1].traits.needs_picture:
        pixels = torch.from_numpy(np.array(picture()))
        return PictureRequest(seed=seed, images=(pixels,), **arguments)
    return PictureRequest(seed=seed, **arguments)


def by_peer(pair: tuple[Any, Any], arguments: dict[str, Any], seed: int = 5) -> Drawn:
    """Sizes that diffusers refuses are the next smaller ones that it takes."""
    peer, pipeline = pair
    steps: list[torch.Tensor] = []
    peer.set_progress_bar_config(disable=True)
    multiple = pipeline.traits.size_multiple
    sizes = {name: arguments[name] // multiple * multiple for name in ("height", "width")}
    more = {"image": picture()} if pipeline.traits.needs_picture else {}
    peer.check_inputs = lambda *given, **named: None
    video = peer(
        generator=torch.Generator("cpu").manual_seed(seed),
        callback_on_step_end=keep_steps(steps),
        output_type="np",
        **{**arguments, **sizes, **more},
    ).frames[0]
    return steps, torch.from_numpy((video * 255).round().astype(np.uint8))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_step_equals_diffusers(
    kind: str, case: str, pairs: dict[str, tuple[Any, Any]]
) -> None:
    arguments = COMMON | CASES[case]
    got = alone(pairs[kind][1], asked(pairs[kind], arguments))
    assert_equal(got, by_peer(pairs[kind], arguments))


def test_the_second_transformer_has_guidance_of_its_own(
    pairs: dict[str, tuple[Any, Any]],
) -> None:
    arguments = COMMON | {"guidance_scale": 4.0, "guidance_scale_2": 2.0}
    got = alone(pairs["two"][1], asked(pairs["two"], arguments))
    assert_equal(got, by_peer(pairs["two"], arguments))
    with pytest.raises(InvalidRequest, match="one transformer"):
        begun(pairs["t2v"][1], asked(pairs["t2v"], arguments))


@pytest.mark.parametrize("kind", ["two", "ti2v picture"])
def test_videos_at_different_timesteps_equal_each_alone(
    kind: str, pairs: dict[str, tuple[Any, Any]]
) -> None:
    pipeline = pairs[kind][1]
    requests = [
        asked(pairs[kind], COMMON | arguments, seed)
        for seed, arguments in enumerate(CASES.values())
    ]
    for request, got in zip(requests, together(pipeline, requests), strict=True):
        assert_equal(got, alone(pipeline, request), atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"num_frames": 0}, "num_frames"),
        ({"height": 7}, "size"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"true_cfg_scale": 2.0}, "true_cfg_scale"),
        ({"strength": 0.5}, "strength"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(
    arguments: dict[str, Any], param: str, pairs: dict[str, tuple[Any, Any]]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        begun(pairs["t2v"][1], asked(pairs["t2v"], COMMON | arguments))
    assert caught.value.param == param
