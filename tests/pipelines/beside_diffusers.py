"""Runs our pipelines and diffusers' on the same request, and compares every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sapwood.pipelines.interface import PictureRequest, Pipeline, Trajectory, result_of

Drawn = tuple[list[Tensor], Tensor]
"""(latents after each step, the picture [H, W, 3] uint8)"""


def by_diffusers(peer: Any, seed: int, **arguments: Any) -> Drawn:
    steps: list[Tensor] = []
    peer.set_progress_bar_config(disable=True)
    pictures = peer(
        generator=torch.Generator("cpu").manual_seed(seed),
        callback_on_step_end=keep_steps(steps),
        output_type="np",
        **arguments,
    ).images
    return steps, torch.from_numpy((pictures[0] * 255).round().astype(np.uint8))


def keep_steps(steps: list[Tensor]) -> Callable[..., dict[str, Any]]:
    """A callback of diffusers that adds the latents of each step to the list."""

    def keep(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(tensors["latents"].clone())
        return tensors

    return keep


def begun(pipeline: Pipeline, request: PictureRequest) -> Trajectory:
    vectors = [pipeline.encode(text) for text in pipeline.texts(request)]
    return result_of(pipeline.begin(request, vectors))


def alone(pipeline: Pipeline, request: PictureRequest) -> Drawn:
    return together(pipeline, [request])[0]


def together(pipeline: Pipeline, requests: Sequence[PictureRequest]) -> list[Drawn]:
    """Each joins one step after the one before, so that their timesteps differ."""
    running: list[Trajectory] = []
    steps: list[list[Tensor]] = [[] for _ in requests]
    waiting = list(requests)
    while waiting or any(one.num_done < one.num_steps for one in running):
        if waiting:
            running.append(begun(pipeline, waiting.pop(0)))
        active = [one for one in running if one.num_done < one.num_steps]
        rows = [one.rows() for one in active]
        predictions = pipeline.predict([row for own in rows for row in own])
        for one, own in zip(active, rows, strict=True):
            one.advance(predictions[: len(own)])
            predictions = predictions[len(own) :]
            steps[running.index(one)].append(one.latents.clone())
    return [(own, result_of(pipeline.finish(one))) for own, one in zip(steps, running, strict=True)]


def assert_equal(got: Drawn, want: Drawn, *, atol: float = 1e-4) -> None:
    assert len(got[0]) == len(want[0])
    for ours, theirs in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(ours, theirs.reshape(ours.shape), atol=atol, rtol=1e-4)
    assert got[1].shape == want[1].shape
    assert (got[1].int() - want[1].int()).abs().max() <= 1
    assert want[1].float().std() > 5, "a picture of one colour would prove nothing"
