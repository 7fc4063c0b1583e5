"""UniPC along a flow from noise to a video, as Wan's checkpoints ask for it.

Source: Zhao et al. 2023, arXiv:2302.04867; Lipman et al. 2022, arXiv:2210.02747."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from sapwood.base.errors import ConfigError, InvalidRequest
from sapwood.pipelines.interface import Schedule
from sapwood.pipelines.noise.flow_match import FlowMatchSchedule
from sapwood.pipelines.noise.multistep import UniPCSteps

_LESS_THAN_ALL = 1e-6
"""Taken from a first sigma of 1, whose logarithm of the picture's share would be infinite."""
_REFUSED = (
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting"),
    *("thresholding", "solver_p", "shift_terminal"),
)


class FlowUniPCSchedule:
    """A sigma is the share of noise in the latents, and 1 - sigma that of the video."""

    initial_scale = 1.0

    def __init__(self, config: Mapping[str, Any], num_steps: int) -> None:
        """config: scheduler_config.json"""
        for name in _REFUSED:
            if config.get(name):
                raise ConfigError(
                    f"scheduler_config.json asks for {name}, which is not implemented"
                )
        prediction = config.get("prediction_type")
        if prediction != "flow_prediction" or config.get("final_sigmas_type", "zero") != "zero":
            raise ConfigError(
                "UniPC along a flow wants the prediction_type flow_prediction and the "
                f"final_sigmas_type zero, but scheduler_config.json has {prediction!r} and "
                f"{config.get('final_sigmas_type', 'zero')!r}"
            )
        train = int(config.get("num_train_timesteps", 1000))
        if num_steps > train:
            raise InvalidRequest(
                f"num_inference_steps must be at most {train}, got {num_steps}",
                param="num_inference_steps",
            )
        even = np.linspace(1.0, 1.0 / train, num_steps + 1)[:-1]
        shift = float(config.get("flow_shift", 1.0))
        sigmas = shift * even / (1.0 + (shift - 1.0) * even)
        if abs(sigmas[0] - 1.0) < _LESS_THAN_ALL:
            sigmas[0] -= _LESS_THAN_ALL
        self._sigmas = [*(float(sigma) for sigma in sigmas.astype(np.float32)), 0.0]
        self.timesteps = [float(int(sigma * train)) for sigma in sigmas]
        self._steps = UniPCSteps(config, self)

    def scaled(self, latents: Tensor, index: int) -> Tensor:
        return latents

    def noised(self, latents: Tensor, noise: Tensor, index: int) -> Tensor:
        sigma = self._sigmas[index]
        return sigma * noise + (1.0 - sigma) * latents

    def point(self, index: int) -> tuple[float, float]:
        sigma = self._sigmas[index]
        return 1.0 - sigma, sigma

    def log_ratio(self, index: int) -> float:
        alpha, sigma = self.point(index)
        return math.inf if sigma == 0.0 else math.log(alpha) - math.log(sigma)

    def finished(self, latents: Tensor, output: Tensor, index: int) -> Tensor:
        return latents - self._sigmas[index] * output

    def step(
        self, latents: Tensor, prediction: Tensor, index: int, draw: Callable[[Tensor], Tensor]
    ) -> Tensor:
        return self._steps.step(latents, prediction, index)


def flow_schedule(config: Mapping[str, Any], num_steps: int) -> Schedule:
    """The schedule of a video. ConfigError for one that follows no flow."""
    name = str(config.get("_class_name", ""))
    if name == "FlowMatchEulerDiscreteScheduler":
        return FlowMatchSchedule(config, num_steps=num_steps)
    if name == "UniPCMultistepScheduler" and config.get("use_flow_sigmas"):
        return FlowUniPCSchedule(config, num_steps)
    raise ConfigError(
        f"the noise schedule {name or 'without a class'} is not implemented for videos; known: "
        "FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler with use_flow_sigmas"
    )
