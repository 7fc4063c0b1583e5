"""Euler's method over sigmas, with new noise in each step (ancestral) or without.

Source: Karras et al. 2022, arXiv:2206.00364."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.pipelines.noise.variance import Training, first_step, karras, timesteps_of


class EulerSchedule:
    """Latents have a picture of factor 1 and noise of factor sigma."""

    is_ancestral = False

    def __init__(
        self, config: Mapping[str, Any], num_steps: int, *, strength: float | None = None
    ) -> None:
        for name, only in (("interpolation_type", "linear"), ("timestep_type", "discrete")):
            if config.get(name, only) != only:
                raise ConfigError(f"{name} {config[name]!r} is not implemented; known: {only}")
        self._training = Training(config, keeps_a_rest=True)
        known = self._training.sigmas
        taken = self._training.spaced(num_steps, usual="linspace")
        sigmas = np.interp(taken, np.arange(len(known)), known)
        if config.get("use_karras_sigmas") and not self.is_ancestral:
            first = float(config.get("sigma_max") or sigmas[0])
            last = float(config.get("sigma_min") or sigmas[-1])
            sigmas = karras(first, last, num_steps)
            taken = timesteps_of(sigmas, known)
        largest = float(sigmas.max())
        is_leading = config.get("timestep_spacing", "linspace") == "leading"
        self.initial_scale = math.sqrt(largest**2 + 1.0) if is_leading else largest
        begin = first_step(num_steps, strength)
        end = 0.0 if self.is_ancestral else self._training.final_sigma()
        self.sigmas = [*(float(sigma) for sigma in sigmas[begin:]), end]
        self.timesteps = [float(np.float32(timestep)) for timestep in taken[begin:]]

    def scaled(self, latents: Tensor, index: int) -> Tensor:
        return latents / math.sqrt(self.sigmas[index] ** 2 + 1.0)

    def noised(self, latents: Tensor, noise: Tensor, index: int) -> Tensor:
        return latents + noise * self.sigmas[index]

    def step(
        self, latents: Tensor, prediction: Tensor, index: int, draw: Callable[[Tensor], Tensor]
    ) -> Tensor:
        now, later = self.sigmas[index], self.sigmas[index + 1]
        exact = latents.float()
        up = 0.0
        if self.is_ancestral:
            up = math.sqrt(later**2 * (now**2 - later**2) / now**2)
            later = math.sqrt(later**2 - up**2)
        direction = (exact - self._finished(exact, prediction, now)) / now
        moved = exact + direction * (later - now)
        if self.is_ancestral:
            moved = moved + draw(prediction) * up
        return moved.to(prediction.dtype)

    def _finished(self, latents: Tensor, output: Tensor, sigma: float) -> Tensor:
        if self._training.prediction == "epsilon":
            return latents - sigma * output
        if self._training.prediction == "sample":
            return output
        whole = sigma**2 + 1.0
        return output * (-sigma / math.sqrt(whole)) + latents / whole


class EulerAncestralSchedule(EulerSchedule):
    """Each step takes away more noise than its share, and adds new one."""

    is_ancestral = True
