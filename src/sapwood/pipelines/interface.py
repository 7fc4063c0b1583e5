"""What the diffusion engine and the pipelines agree on.

A picture is a **trajectory**: latents, the vectors of its prompts, a noise schedule of its own and
the number of steps that are done. A step asks each trajectory for its **rows**, computes all of
them in one call of the transformer, whatever their timesteps and sizes, and gives each trajectory
its predictions back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from sapwood.models.dit.rows import DenoisingRow
from sapwood.schema.painting import PipelineTraits

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PictureRequest:
    """One picture that is asked for; None: as the pipeline does it by default.

    height, width   in pixels; a pipeline takes the next smaller size that it can draw
    guidance_scale  of the transformer's own input, or of two passes, as the pipeline has it
    true_cfg_scale  of two passes, for pipelines whose transformer has an input for guidance too
    seed            of the generator on the CPU that draws all noise of the picture
    images          [H, W, 3] uint8: pictures to begin from, to change or to look at
    mask            [H, W] uint8: 255 where `images[0]` is to be drawn anew
    strength        0..1: how much of `images[0]` is replaced by noise before the first step
    num_frames      of a video
    guidance_scale_2  of the second transformer, where a pipeline has two
    """

    prompt: str
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    seed: int = 0
    images: tuple[Tensor, ...] = ()
    mask: Tensor | None = None
    strength: float | None = None
    max_sequence_length: int | None = None
    num_frames: int | None = None
    guidance_scale_2: float | None = None


@dataclass(frozen=True, slots=True)
class PromptText:
    """A text that a pipeline wants encoded, with all that its vectors depend on, so that they can
    be kept for the next request.

    role    "positive" or "negative"
    images  of the request that the encoder looks at too; they make the vectors one request's own
    """

    text: str
    max_sequence_length: int
    role: str = "positive"
    images: tuple[Tensor, ...] = field(default=(), compare=False, hash=False)


@dataclass(frozen=True, slots=True, eq=False)
class PromptVectors:
    """states [L, size] of a prompt's tokens; pooled [size]: one vector of the whole, or None"""

    states: Tensor
    pooled: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return sum(
            x.numel() * x.element_size() for x in (self.states, self.pooled) if x is not None
        )


class Schedule(Protocol):
    """The timesteps of one trajectory, and what a step does to its latents. It may remember
    predictions of earlier steps, so that no two trajectories share one.

    timesteps      of the steps, as the transformer is given them
    initial_scale  of the noise that a trajectory starts with
    """

    @property
    def timesteps(self) -> Sequence[float]: ...

    @property
    def initial_scale(self) -> float: ...

    def scaled(self, latents: Tensor, index: int) -> Tensor:
        """The latents as the transformer is given them at that step."""
        ...

    def noised(self, latents: Tensor, noise: Tensor, index: int) -> Tensor:
        """Finished latents with the noise that they have before that step."""
        ...

    def step(
        self, latents: Tensor, prediction: Tensor, index: int, draw: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The latents after that step. draw(x): new noise in the shape and dtype of x"""
        ...


class Trajectory(Protocol):
    """One picture on its way. Its tensors are nobody else's, and go with it.

    latents    as the transformer has them; their layout is the pipeline's
    num_done   steps that are done
    num_steps  steps in all
    """

    latents: Tensor
    num_done: int

    @property
    def num_steps(self) -> int: ...

    @property
    def num_tokens(self) -> int:
        """Of all rows of a step: what a step's budget is counted in."""
        ...

    def rows(self) -> list[Any]:
        """Of the next step: one, or two with guidance of two passes. DenoisingRow, or what the
        pipeline's denoiser takes in its place."""
        ...

    def advance(self, predictions: Sequence[Tensor]) -> None:
        """Take the step, with the prediction of each row."""
        ...


class Pipeline(Protocol):
    """The components of one model."""

    name: str

    @property
    def traits(self) -> PipelineTraits: ...

    def texts(self, request: PictureRequest) -> tuple[PromptText, ...]:
        """The texts to encode; those of equal requests are equal."""
        ...

    def encode(self, text: PromptText) -> PromptVectors: ...

    def begin(
        self, request: PictureRequest, vectors: Sequence[PromptVectors]
    ) -> Generator[None, None, Trajectory]:
        """The trajectory of a picture, before its first step; `vectors` of `texts`. Yields between
        pieces of work on pictures to look at.

        Raises InvalidRequest for sizes, steps and pictures that the pipeline cannot draw."""
        ...

    def predict(self, rows: Sequence[Any]) -> list[Tensor]:
        """Rows of any trajectories of this pipeline, in one call of the transformer."""
        ...

    def finish(self, trajectory: Trajectory) -> Generator[None, None, Tensor]:
        """The picture [H, W, 3] uint8, or [H, W, 4] with its opacity, of the latents as they are;
        of a video all frames [F, H, W, 3]. Yields between tiles."""
        ...


def as_pixels(picture: Tensor) -> Tensor:
    """picture [3 or 4, H, W] in -1..1 -> [H, W, 3 or 4] uint8"""
    levels = (picture.float() * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0
    return levels.round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu()


def run_whole(pipeline: Pipeline, request: PictureRequest) -> Tensor:
    """One picture without an engine."""
    vectors = [pipeline.encode(text) for text in pipeline.texts(request)]
    trajectory = result_of(pipeline.begin(request, vectors))
    while trajectory.num_done < trajectory.num_steps:
        trajectory.advance(pipeline.predict(trajectory.rows()))
    return result_of(pipeline.finish(trajectory))


def result_of(work: Generator[None, None, T]) -> T:
    """Do all of the work at once."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return cast(T, end.value)


__all__ = [
    "DenoisingRow",
    "PictureRequest",
    "Pipeline",
    "PromptText",
    "PromptVectors",
    "Schedule",
    "Trajectory",
    "as_pixels",
    "result_of",
    "run_whole",
]
