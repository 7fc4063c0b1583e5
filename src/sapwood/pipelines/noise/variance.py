"""What the schedules of noise predictors share: the share of a picture at each of the timesteps of
training, and which of these are taken. Source: Ho et al. 2020, arXiv:2006.11239; Lin et al. 2023,
arXiv:2305.08891 (spacing, no picture left at the last timestep)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sapwood.base.errors import ConfigError, InvalidRequest

Array = npt.NDArray[np.float64]
_ALMOST_NOTHING = 2.0**-24
_REFUSED = (
    *("trained_betas", "thresholding", "use_exponential_sigmas", "use_beta_sigmas"),
    *("use_lu_lambdas", "use_flow_sigmas", "solver_p", "use_dynamic_shifting"),
)
_PREDICTIONS = ("epsilon", "sample", "v_prediction")


class Training:
    """The timesteps of training, and the shares of picture and noise at each.

    alphas      [T]: square of a picture's factor, falling
    prediction  what the model predicts: the noise ("epsilon"), the picture, or their "velocity"
    """

    def __init__(self, config: Mapping[str, Any], *, keeps_a_rest: bool = False) -> None:
        """config: scheduler_config.json

        keeps_a_rest  whether a little of the picture is left where nothing should be, for schedules
                      that divide by it
        """
        for name in _REFUSED:
            if config.get(name):
                raise ConfigError(
                    f"scheduler_config.json asks for {name}, which is not implemented"
                )
        self.prediction = str(config.get("prediction_type", "epsilon"))
        if self.prediction not in _PREDICTIONS:
            raise ConfigError(
                f"prediction_type {self.prediction!r} is not implemented; known: "
                f"{', '.join(_PREDICTIONS)}"
            )
        self.num_timesteps = int(config.get("num_train_timesteps", 1000))
        self._config = config
        betas = _betas(config, self.num_timesteps)
        is_rescaled = bool(config.get("rescale_betas_zero_snr"))
        if is_rescaled:
            betas = _without_rest(betas)
        alphas = torch.cumprod(1.0 - betas, dim=0)
        if is_rescaled and keeps_a_rest:
            alphas[-1] = _ALMOST_NOTHING
        self.alphas: Array = alphas.double().numpy()

    @property
    def sigmas(self) -> Array:
        """[T]: noise beside a picture of factor 1, rising"""
        return np.asarray(((1.0 - self.alphas) / self.alphas) ** 0.5)

    @property
    def final_alpha(self) -> float:
        """After the last step."""
        return 1.0 if self._config.get("set_alpha_to_one", True) else float(self.alphas[0])

    def final_sigma(self) -> float:
        kind = self._config.get("final_sigmas_type", "zero")
        if kind not in ("zero", "sigma_min"):
            raise ConfigError(f"final_sigmas_type must be zero or sigma_min, got {kind!r}")
        return 0.0 if kind == "zero" else float(self.sigmas[0])

    def spaced(self, num_steps: int, *, usual: str, leaves_out_last: bool = False) -> Array:
        """The timesteps of that many steps, falling.

        usual            spacing, where the config says none
        leaves_out_last  whether one step more is spaced, whose timestep 0 is not taken
        Raises           InvalidRequest for more steps than training had timesteps
        """
        if num_steps > self.num_timesteps:
            raise InvalidRequest(
                f"num_inference_steps must be at most {self.num_timesteps}, got {num_steps}",
                param="num_inference_steps",
            )
        kind = self._config.get("timestep_spacing", usual)
        offset = int(self._config.get("steps_offset", 0))
        more = num_steps + leaves_out_last
        if kind == "linspace":
            return np.linspace(0, self.num_timesteps - 1, more)[::-1][:num_steps]
        if kind == "leading":
            step = self.num_timesteps // more
            return (np.arange(more) * step)[::-1][:num_steps].astype(np.float64) + offset
        if kind == "trailing":
            step_size = self.num_timesteps / num_steps
            return np.round(np.arange(self.num_timesteps, 0, -step_size)) - 1.0
        raise ConfigError(f"timestep_spacing {kind!r} is not implemented")

    def finished(self, sample: Tensor, output: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """(the picture, the noise) of a sample with that square of the picture's factor"""
        picture, noise = math.sqrt(alpha), math.sqrt(1.0 - alpha)
        if self.prediction == "epsilon":
            return (sample - noise * output) / picture, output
        if self.prediction == "sample":
            return output, (sample - picture * output) / noise
        return picture * sample - noise * output, picture * output + noise * sample


def karras(first: float, last: float, num_steps: int) -> Array:
    """Sigmas that fall from the first to the last. Source: Karras et al. 2022, arXiv:2206.00364."""
    rho = 7.0
    ramp = np.linspace(0.0, 1.0, num_steps)
    ends = first ** (1 / rho), last ** (1 / rho)
    return np.asarray((ends[0] + ramp * (ends[1] - ends[0])) ** rho)


def timesteps_of(sigmas: Array, known: Array) -> Array:
    """The timesteps of training, with fractions, at which noise has these sigmas. known [T]"""
    return np.interp(np.log(sigmas), np.log(known), np.arange(len(known), dtype=np.float64))


def first_step(num_steps: int, strength: float | None) -> int:
    """The first of that many steps that is taken, if a share `strength` of a picture is noise."""
    if strength is None:
        return 0
    if not 0.0 <= strength <= 1.0:
        raise InvalidRequest(f"strength must be 0..1, got {strength}", param="strength")
    first = max(num_steps - min(int(num_steps * strength), num_steps), 0)
    if first == num_steps:
        raise InvalidRequest(
            f"a strength of {strength} leaves none of {num_steps} steps; use a larger one, or more "
            "steps",
            param="strength",
        )
    return first


def _betas(config: Mapping[str, Any], count: int) -> Tensor:
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        return torch.linspace(start, end, count, dtype=torch.float32)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    if kind == "squaredcos_cap_v2":

        def share(time: float) -> float:
            return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

        return torch.tensor(
            [min(1 - share((i + 1) / count) / share(i / count), 0.999) for i in range(count)]
        )
    raise ConfigError(f"beta_schedule {kind!r} is not implemented")


def _without_rest(betas: Tensor) -> Tensor:
    """Stretched so that nothing of the picture is left at the last timestep."""
    roots = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    shares = ((roots - last) * first / (first - last)) ** 2
    return 1.0 - torch.cat((shares[:1], shares[1:] / shares[:-1]))
