"""A pipeline that nobody wrote: diffusers draws, and this module lets it go step by step.

A pipeline of diffusers is one call for a whole picture, and keeps that picture's state in itself:
so one picture is drawn at a time. The call runs in a thread, which waits after each step until the
runtime asks for the next one; so steps are counted, and an abort takes effect between two steps.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError, InvalidRequest, SapwoodError, WeightError
from sapwood.pipelines.interface import PictureRequest, PromptText, PromptVectors
from sapwood.pipelines.pictures import as_picture
from sapwood.schema.limits import INPUT_PICTURES
from sapwood.schema.painting import PictureDefaults, PipelineTraits

_MAX_REASON = 500
_SETTINGS = (
    "negative_prompt",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "max_sequence_length",
    "strength",
)
_WRONG = (ValueError, TypeError, NotImplementedError)
"""What diffusers raises for arguments that it cannot take."""


class _StoppedError(Exception):
    """The picture is not wanted any more."""


class _Call:
    """One call of a function in a thread that goes on only when it is told to."""

    def __init__(self, draw: Callable[[Callable[[], None]], Any]) -> None:
        """draw: is given what it has to call after each step"""
        self._go = threading.Semaphore(0)
        self._paused = threading.Semaphore(0)
        self._is_stopped = False
        self.has_ended = False
        self.result: Any = None
        self.error: Exception | None = None
        self._thread = threading.Thread(
            target=self._run, args=(draw,), name="diffusers", daemon=True
        )
        self._thread.start()

    def resume(self) -> None:
        """Go on until the end of the next step, or of the call."""
        if self.has_ended:
            return
        self._go.release()
        self._paused.acquire()

    def stop(self) -> None:
        """End the call where it waits, and free what it has."""
        self._is_stopped = True
        self._go.release()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _wait(self) -> None:
        self._go.acquire()
        if self._is_stopped:
            raise _StoppedError

    def _after_step(self) -> None:
        self._paused.release()
        self._wait()

    def _run(self, draw: Callable[[Callable[[], None]], Any]) -> None:
        try:
            self._wait()
            self.result = draw(self._after_step)
        except _StoppedError:
            pass
        except Exception as error:  # noqa: BLE001 - raised where the picture is waited for
            self.error = error
        self.has_ended = True
        self._paused.release()


@dataclass(slots=True, eq=False, weakref_slot=True)
class DiffusersTrajectory:
    """latents: none; diffusers has them"""

    call: _Call
    num_steps: int
    num_tokens: int
    latents: Tensor
    num_done: int = 0

    def rows(self) -> list[DiffusersTrajectory]:
        """As Trajectory.rows."""
        return [self]

    def advance(self, predictions: Sequence[Tensor]) -> None:
        """As Trajectory.advance. Some pipelines take other numbers of steps than they are told."""
        if self.call.has_ended:
            self.num_done = self.num_steps
        elif self.num_done < self.num_steps:
            self.num_done += 1


class DiffusersPipeline:
    """Any pipeline of diffusers that makes pictures."""

    def __init__(self, pipeline: Any) -> None:
        self.name = type(pipeline).__name__
        self._pipeline = pipeline
        self._parameters: Mapping[str, inspect.Parameter] = inspect.signature(
            pipeline.__call__
        ).parameters
        pipeline.set_progress_bar_config(disable=True)
        if "prompt" not in self._parameters:
            raise ConfigError(f"{self.name} takes no prompt, so it cannot be served")

    @staticmethod
    def load(folder: Path, dtype: torch.dtype, *, vae_tiling: bool = False) -> DiffusersPipeline:
        """ConfigError without diffusers, WeightError if it cannot load the folder."""
        try:
            import diffusers
        except ImportError as error:
            raise ConfigError(
                "this pipeline runs through diffusers, which is not installed; install it with "
                "`pip install 'sapwood[paint]'`"
            ) from error
        try:
            any_pipeline: Any = diffusers.DiffusionPipeline
            pipeline = any_pipeline.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
        except (OSError, ValueError, AttributeError, ImportError, KeyError) as error:
            raise WeightError(f"diffusers cannot load {folder}: {error}") from error
        if vae_tiling:
            vae = getattr(pipeline, "vae", None)
            if vae is None or not callable(getattr(vae, "enable_tiling", None)):
                raise ConfigError(
                    f"--vae-tiling: {type(pipeline).__name__} of diffusers cannot decode in tiles; "
                    "leave it out"
                )
            vae.enable_tiling()
        return DiffusersPipeline(pipeline)

    @property
    def traits(self) -> PipelineTraits:
        """As Pipeline.traits."""
        scale = getattr(self._pipeline, "vae_scale_factor", None)
        latents = getattr(self._pipeline, "default_sample_size", None)
        side = scale * latents if isinstance(scale, int) and isinstance(latents, int) else None
        takes_pictures = "image" in self._parameters
        return PipelineTraits(
            defaults=PictureDefaults(
                width=side,
                height=side,
                num_inference_steps=self._default("num_inference_steps"),
                guidance_scale=self._default("guidance_scale"),
            ),
            size_multiple=scale if isinstance(scale, int) else 1,
            max_input_pictures=INPUT_PICTURES.most if takes_pictures else 0,
            needs_picture=takes_pictures and _is_needed(self._parameters["image"]),
            takes_mask="mask_image" in self._parameters,
            max_together=1,
        )

    def texts(self, request: PictureRequest) -> tuple[PromptText, ...]:
        """As Pipeline.texts. diffusers encodes them itself."""
        self._arguments(request)
        return ()

    def encode(self, text: PromptText) -> PromptVectors:
        """As Pipeline.encode; never asked for, since there are no texts."""
        raise AssertionError("diffusers encodes its texts itself")

    def begin(
        self, request: PictureRequest, vectors: Sequence[PromptVectors]
    ) -> Generator[None, None, DiffusersTrajectory]:
        """As Pipeline.begin."""
        yield from ()
        arguments = self._arguments(request)
        steps = arguments.get("num_inference_steps", self._default("num_inference_steps"))
        pipeline, takes_steps = self._pipeline, "callback_on_step_end" in self._parameters

        def draw(after_step: Callable[[], None]) -> Any:
            def stepped(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> Any:
                after_step()
                return tensors

            if takes_steps:
                arguments["callback_on_step_end"] = stepped
            return pipeline(output_type="pil", **arguments)

        call = _Call(draw)
        trajectory = DiffusersTrajectory(
            call=call,
            num_steps=int(steps) if takes_steps and steps else 1,
            num_tokens=1,
            latents=torch.empty(0),
        )
        weakref.finalize(trajectory, call.stop)
        return trajectory

    def predict(self, rows: Sequence[Any]) -> list[Tensor]:
        """As Pipeline.predict: the step is taken here."""
        for row in rows:
            row.call.resume()
            self._check(row.call)
        return [row.latents for row in rows]

    def finish(self, trajectory: Any) -> Generator[None, None, Tensor]:
        """As Pipeline.finish."""
        if trajectory.num_done < trajectory.num_steps:
            raise InvalidRequest(
                "partial_images is not offered where diffusers draws; leave it out",
                param="partial_images",
            )
        while not trajectory.call.has_ended:
            yield
            trajectory.call.resume()
        self._check(trajectory.call)
        images = getattr(trajectory.call.result, "images", None)
        if not images:
            raise SapwoodError(f"{self.name} made something else than pictures")
        return _pixels(images[0])

    def _arguments(self, request: PictureRequest) -> dict[str, Any]:
        """Of the call. InvalidRequest names what the pipeline does not take."""
        given: dict[str, Any] = {
            name: value for name in _SETTINGS if (value := getattr(request, name)) is not None
        }
        if request.images:
            pictures = [as_picture(pixels) for pixels in request.images]
            given["image"] = pictures if len(pictures) > 1 else pictures[0]
        if request.mask is not None:
            from PIL import Image

            given["mask_image"] = Image.fromarray(request.mask.numpy())
        for name in given:
            if name not in self._parameters:
                told = {"image": "image", "mask_image": "mask"}.get(name, name)
                raise InvalidRequest(f"{self.name} takes no {told}; leave it out", param=told)
        image = self._parameters.get("image")
        if image is not None and "image" not in given and _is_needed(image):
            raise InvalidRequest(
                f"{self.name} changes pictures; send one to /v1/images/edits", param="image"
            )
        generator = torch.Generator("cpu").manual_seed(request.seed)
        return {"prompt": request.prompt, "generator": generator, **given}

    def _default(self, name: str) -> Any:
        parameter = self._parameters.get(name)
        return None if parameter is None else parameter.default

    def _check(self, call: _Call) -> None:
        error = call.error
        if error is None:
            return
        reason = str(error)[:_MAX_REASON]
        if isinstance(error, _WRONG):
            raise InvalidRequest(f"{self.name} of diffusers refuses the request: {reason}")
        raise SapwoodError(f"{self.name} of diffusers failed: {type(error).__name__}: {reason}")


def _is_needed(image: inspect.Parameter) -> bool:
    """Pipelines that change pictures have `image` before everything that has a default of its own;
    diffusers gives it None, and then fails on None."""
    return image.default is inspect.Parameter.empty


def _pixels(image: Any) -> Tensor:
    """An image of PIL as [H, W, 3] or [H, W, 4] uint8"""
    import numpy as np

    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    return torch.from_numpy(np.array(image.convert(mode)))
