"""Schedules that step from timestep to timestep: DDIM, PNDM and LCM."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from sapwood.base.errors import ConfigError, InvalidRequest
from sapwood.pipelines.noise.variance import Array, Training, first_step


class _ByTimestep:
    """Steps between timesteps of training; the model is given latents as they are."""

    initial_scale = 1.0

    def __init__(self, training: Training, timesteps: Array, first: int) -> None:
        self._training = training
        self._taken = [int(timestep) for timestep in timesteps[first:]]
        self.timesteps = [float(timestep) for timestep in self._taken]

    def scaled(self, latents: Tensor, index: int) -> Tensor:
        return latents

    def noised(self, latents: Tensor, noise: Tensor, index: int) -> Tensor:
        alpha = float(self._training.alphas[self._taken[index]])
        return math.sqrt(alpha) * latents + math.sqrt(1.0 - alpha) * noise

    def _alpha(self, timestep: int) -> float:
        if timestep < 0:
            return self._training.final_alpha
        return float(self._training.alphas[timestep])


class DDIMSchedule(_ByTimestep):
    """Source: Song et al. 2020, arXiv:2010.02502, without noise (eta 0)."""

    def __init__(
        self, config: Mapping[str, Any], num_steps: int, *, strength: float | None = None
    ) -> None:
        training = Training(config)
        spaced = np.round(training.spaced(num_steps, usual="leading"))
        super().__init__(training, spaced, first_step(num_steps, strength))
        self._stride = training.num_timesteps // num_steps
        self._clip = _clip_of(config)

    def step(
        self, latents: Tensor, prediction: Tensor, index: int, draw: Callable[[Tensor], Tensor]
    ) -> Tensor:
        now = self._taken[index]
        alpha, later = self._alpha(now), self._alpha(now - self._stride)
        picture, noise = self._training.finished(latents, prediction, alpha)
        if self._clip is not None:
            picture = picture.clamp(-self._clip, self._clip)
        return math.sqrt(later) * picture + math.sqrt(1.0 - later) * noise


class PNDMSchedule(_ByTimestep):
    """Linear multistep steps over the last four predictions; the second step repeats the first.

    Source: Liu et al. 2022, arXiv:2202.09778."""

    def __init__(
        self, config: Mapping[str, Any], num_steps: int, *, strength: float | None = None
    ) -> None:
        if not config.get("skip_prk_steps", False):
            raise ConfigError(
                "PNDM with Runge-Kutta steps (skip_prk_steps false) is not implemented"
            )
        if num_steps < 2:
            raise InvalidRequest(
                f"num_inference_steps is {num_steps}, but the noise schedule PNDM of this model "
                "repeats its first step and takes at least 2",
                param="num_inference_steps",
            )
        training = Training({"set_alpha_to_one": False, **config})
        spaced = training.spaced(num_steps, usual="leading")
        if config.get("timestep_spacing", "leading") == "linspace":
            spaced = np.round(spaced)
        twice = np.concatenate([spaced[:1], spaced[1:2], spaced[1:2], spaced[2:]])
        super().__init__(training, twice, first_step(num_steps, strength))
        self._stride = training.num_timesteps // num_steps
        self._known: list[Tensor] = []
        self._first: Tensor | None = None

    def step(
        self, latents: Tensor, prediction: Tensor, index: int, draw: Callable[[Tensor], Tensor]
    ) -> Tensor:
        now = self._taken[index]
        later = now - self._stride
        if index == 1:
            assert self._first is not None
            now, later = now + self._stride, now
            output = (prediction + self._known[-1]) / 2
            return self._moved(self._first, output, now, later)
        self._known = [*self._known[-3:], prediction]
        if index == 0:
            self._first = latents
        return self._moved(latents, self._mixed(), now, later)

    def _mixed(self) -> Tensor:
        known = self._known[::-1]
        if len(known) == 1:
            return known[0]
        if len(known) == 2:
            return (3 * known[0] - known[1]) / 2
        if len(known) == 3:
            return (23 * known[0] - 16 * known[1] + 5 * known[2]) / 12
        return (55 * known[0] - 59 * known[1] + 37 * known[2] - 9 * known[3]) / 24

    def _moved(self, latents: Tensor, output: Tensor, now: int, later: int) -> Tensor:
        a, b = self._alpha(now), self._alpha(later)
        if self._training.prediction == "v_prediction":
            output = math.sqrt(a) * output + math.sqrt(1.0 - a) * latents
        divisor = a * math.sqrt(1.0 - b) + math.sqrt(a * (1.0 - a) * b)
        return math.sqrt(b / a) * latents - (b - a) / divisor * output


class LCMSchedule(_ByTimestep):
    """A few steps, each to a whole picture that gets noise again. Source: Luo et al. 2023,
    arXiv:2310.04378."""

    def __init__(
        self, config: Mapping[str, Any], num_steps: int, *, strength: float | None = None
    ) -> None:
        training = Training(config)
        original = int(config.get("original_inference_steps", 50))
        if not 1 <= num_steps <= original:
            raise InvalidRequest(
                f"num_inference_steps must be 1..{original}, got {num_steps}",
                param="num_inference_steps",
            )
        known = (np.arange(1, original + 1) * (training.num_timesteps // original) - 1)[::-1]
        chosen = np.floor(np.linspace(0, original, num_steps, endpoint=False)).astype(np.int64)
        super().__init__(
            training, known[chosen].astype(np.float64), first_step(num_steps, strength)
        )
        self._scaling = float(config.get("timestep_scaling", 10.0))
        self._clip = _clip_of({"clip_sample": False, **config})

    def step(
        self, latents: Tensor, prediction: Tensor, index: int, draw: Callable[[Tensor], Tensor]
    ) -> Tensor:
        now = self._taken[index]
        picture, _ = self._training.finished(latents, prediction, self._alpha(now))
        if self._clip is not None:
            picture = picture.clamp(-self._clip, self._clip)
        time, data = now * self._scaling, 0.5
        kept = data**2 / (time**2 + data**2)
        picture = time / math.sqrt(time**2 + data**2) * picture + kept * latents
        if index == len(self._taken) - 1:
            return picture
        later = self._alpha(self._taken[index + 1])
        return math.sqrt(later) * picture + math.sqrt(1.0 - later) * draw(prediction)


def _clip_of(config: Mapping[str, Any]) -> float | None:
    if not config.get("clip_sample", True):
        return None
    return float(config.get("clip_sample_range", 1.0))
