"""Steps along a flow from noise to a picture, by Euler's method. Source: Lipman et al. 2022,
arXiv:2210.02747; Esser et al. 2024, arXiv:2403.03206 (the shift of timesteps)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sapwood.base.errors import ConfigError

Array = npt.NDArray[np.floating[Any]]
_REFUSED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")


class FlowMatchSchedule:
    """One picture's steps. A sigma is the share of noise in the latents: 1 at first, 0 at last."""

    initial_scale = 1.0

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        sigmas: Sequence[float] | Array | None = None,
        num_steps: int | None = None,
        mu: float | None = None,
        strength: float | None = None,
    ) -> None:
        """config: scheduler_config.json

        sigmas     before the shift, the first step's first; None: `num_steps` as the config says
        mu         of a dynamic shift, which a config may ask for
        strength   as of a PictureRequest: only the last steps are taken
        """
        for name in _REFUSED:
            if config.get(name):
                raise ConfigError(
                    f"scheduler_config.json asks for {name}, which is not implemented"
                )
        train = int(config.get("num_train_timesteps", 1000))
        before = _evenly(config, train, num_steps) if sigmas is None else np.asarray(sigmas)
        shifted = _shifted(config, before.astype(np.float32 if sigmas is not None else float), mu)
        end = config.get("shift_terminal")
        if end:
            # Stretched so that the last step has this sigma.
            shifted = 1.0 - (1.0 - shifted) * (1.0 - float(end)) / (1.0 - shifted[-1])
        first = _first_step(len(shifted), strength)
        kept = [float(sigma) for sigma in shifted.astype(np.float32)[first:]]
        self.sigmas = [*kept, 0.0]
        self.timesteps = [sigma * train for sigma in kept]
        self._is_stochastic = bool(config.get("stochastic_sampling"))

    def scaled(self, latents: Tensor, index: int) -> Tensor:
        return latents

    def noised(self, latents: Tensor, noise: Tensor, index: int) -> Tensor:
        sigma = self.sigmas[index]
        return sigma * noise + (1.0 - sigma) * latents

    def step(
        self, latents: Tensor, prediction: Tensor, index: int, draw: Callable[[Tensor], Tensor]
    ) -> Tensor:
        now, later = self.sigmas[index], self.sigmas[index + 1]
        exact = latents.float()
        if self._is_stochastic:
            finished = exact - now * prediction
            moved = (1.0 - later) * finished + later * draw(exact)
        else:
            moved = exact + (later - now) * prediction
        return moved.to(latents.dtype)


def shift_by_tokens(config: Mapping[str, Any], num_tokens: int) -> float:
    """mu of a picture of that many tokens: on a line between two sizes that the config gives."""
    low = int(config.get("base_image_seq_len", 256))
    high = int(config.get("max_image_seq_len", 4096))
    at_low = float(config.get("base_shift", 0.5))
    at_high = float(config.get("max_shift", 1.15))
    return at_low + (at_high - at_low) / (high - low) * (num_tokens - low)


def _first_step(num_steps: int, strength: float | None) -> int:
    if strength is None:
        return 0
    return int(max(num_steps - min(num_steps * strength, num_steps), 0))


def _evenly(config: Mapping[str, Any], train: int, num_steps: int | None) -> Array:
    """Equal steps between the first and the last sigma of training."""
    assert num_steps is not None, "either sigmas or their number is given"
    ends = np.asarray([1.0, 1.0 / train])
    if not config.get("use_dynamic_shifting"):
        ends = _static(ends, float(config.get("shift", 1.0)))
    return np.linspace(ends[0] * train, ends[1] * train, num_steps) / train


def _static(sigmas: Array, shift: float) -> Array:
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def _shifted(config: Mapping[str, Any], sigmas: Array, mu: float | None) -> Array:
    if not config.get("use_dynamic_shifting"):
        return _static(sigmas, float(config.get("shift", 1.0)))
    if mu is None:
        raise ConfigError("the scheduler shifts by size, but this pipeline gives it none")
    kind = config.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise ConfigError(f"time_shift_type must be exponential or linear, got {kind!r}")
    strength = math.exp(mu) if kind == "exponential" else mu
    return strength / (strength + (1.0 / sigmas - 1.0))
