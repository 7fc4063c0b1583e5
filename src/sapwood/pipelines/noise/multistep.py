"""Methods of a higher order that look at the predictions of earlier steps: DPM-Solver++ and UniPC.

Source: Lu et al. 2022, arXiv:2211.01095; Zhao et al. 2023, arXiv:2302.04867."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.pipelines.noise.variance import Training, first_step, karras, timesteps_of

_MANY_STEPS = 15
"""From so many steps on the last one need not be of a lower order."""


class _Multistep:
    """Steps between points (alpha, sigma), whose lambda = log(alpha / sigma) rises."""

    initial_scale = 1.0

    def __init__(
        self, config: Mapping[str, Any], num_steps: int, *, strength: float | None
    ) -> None:
        training = self._training = Training(config, keeps_a_rest=True)
        known = training.sigmas
        taken = np.round(training.spaced(num_steps, usual="linspace", leaves_out_last=True))
        if config.get("use_karras_sigmas"):
            first = float(config.get("sigma_max") or known[-1])
            sigmas = karras(first, float(config.get("sigma_min") or known[0]), num_steps)
            taken = timesteps_of(sigmas, known)
            if config.get("beta_schedule") != "squaredcos_cap_v2":
                taken = np.round(taken)
        else:
            sigmas = np.interp(taken, np.arange(len(known)), known)
        begin = first_step(num_steps, strength)
        self._sigmas = [*(float(sigma) for sigma in sigmas[begin:]), training.final_sigma()]
        self.timesteps = [float(int(timestep)) for timestep in taken[begin:]]
        self._order = int(config.get("solver_order", 2))
        self._known: list[Tensor] = []

    def scaled(self, latents: Tensor, index: int) -> Tensor:
        return latents

    def noised(self, latents: Tensor, noise: Tensor, index: int) -> Tensor:
        alpha, sigma = self.point(index)
        return alpha * latents + sigma * noise

    def point(self, index: int) -> tuple[float, float]:
        sigma = self._sigmas[index]
        alpha = 1.0 / math.sqrt(sigma**2 + 1.0)
        return alpha, sigma * alpha

    def log_ratio(self, index: int) -> float:
        sigma = self._sigmas[index]
        return math.inf if sigma == 0.0 else -math.log(sigma)

    def finished(self, latents: Tensor, output: Tensor, index: int) -> Tensor:
        alpha, _ = self.point(index)
        return self._training.finished(latents, output, alpha**2)[0]

    @property
    def _num_steps(self) -> int:
        return len(self.timesteps)


class DPMSolverSchedule(_Multistep):
    """DPM-Solver++ of the first or second order, with new noise in each step (sde) or without."""

    def __init__(
        self, config: Mapping[str, Any], num_steps: int, *, strength: float | None = None
    ) -> None:
        super().__init__(config, num_steps, strength=strength)
        kind = config.get("algorithm_type", "dpmsolver++")
        solver = config.get("solver_type", "midpoint")
        if kind not in ("dpmsolver++", "sde-dpmsolver++") or solver not in ("midpoint", "heun"):
            raise ConfigError(f"DPM-Solver of type {kind!r} and {solver!r} is not implemented")
        if self._order not in (1, 2):
            raise ConfigError(f"DPM-Solver's solver_order must be 1 or 2, got {self._order}")
        if config.get("lambda_min_clipped", -math.inf) != -math.inf:
            raise ConfigError("DPM-Solver's lambda_min_clipped is not implemented")
        self._is_stochastic = kind.startswith("sde")
        self._is_heun = solver == "heun"
        self._ends_low = (
            bool(config.get("euler_at_final"))
            or (bool(config.get("lower_order_final", True)) and self._num_steps < _MANY_STEPS)
            or self._sigmas[-1] == 0.0
        )

    def step(
        self, latents: Tensor, prediction: Tensor, index: int, draw: Callable[[Tensor], Tensor]
    ) -> Tensor:
        finished = self.finished(latents, prediction, index)
        self._known = [*self._known[-1:], finished]
        exact = latents.float()
        noise = draw(exact) if self._is_stochastic else None
        is_low = index == self._num_steps - 1 and self._ends_low
        moved = self._moved(exact, finished, index, noise, is_first_order=is_low)
        return moved.to(prediction.dtype)

    def _moved(
        self,
        x: Tensor,
        finished: Tensor,
        index: int,
        noise: Tensor | None,
        *,
        is_first_order: bool,
    ) -> Tensor:
        alpha, sigma = self.point(index + 1)
        h = self.log_ratio(index + 1) - self.log_ratio(index)
        power = 2.0 if noise is not None else 1.0
        falls = 1.0 - math.exp(-power * h)
        shrinks = sigma / self.point(index)[1]
        if noise is not None:
            shrinks *= math.exp(-h)
        moved = shrinks * x + alpha * falls * finished
        if len(self._known) == 2 and self._order == 2 and not is_first_order:
            before = self.log_ratio(index) - self.log_ratio(index - 1)
            slope = (h / before) * (self._known[1] - self._known[0])
            weight = 0.5 * falls
            if self._is_heun:
                weight = 1.0 - falls / (power * h)
            moved = moved + alpha * weight * slope
        if noise is not None:
            moved = moved + sigma * math.sqrt(1.0 - math.exp(-2.0 * h)) * noise
        return moved


class Points(Protocol):
    """Where a method steps from, and to: after the last timestep there is one point more."""

    @property
    def timesteps(self) -> Sequence[float]: ...

    def point(self, index: int) -> tuple[float, float]:
        """The shares of the picture and of the noise before that step."""
        ...

    def log_ratio(self, index: int) -> float:
        """The logarithm of the first by the second."""
        ...

    def finished(self, latents: Tensor, output: Tensor, index: int) -> Tensor:
        """The picture that the model expects at the end."""
        ...


class UniPCSteps:
    """A step is corrected once the prediction at its end is known, before the next is taken."""

    def __init__(self, config: Mapping[str, Any], points: Points) -> None:
        """config: scheduler_config.json"""
        if not config.get("predict_x0", True) or config.get("disable_corrector"):
            raise ConfigError(
                "UniPC without predict_x0, or with disable_corrector, is not implemented"
            )
        self._kind = config.get("solver_type", "bh2")
        if self._kind not in ("bh1", "bh2"):
            raise ConfigError(f"UniPC's solver_type {self._kind!r} is not implemented")
        self._points = points
        self._order = int(config.get("solver_order", 2))
        self._ends_low = bool(config.get("lower_order_final", True))
        self._known: list[Tensor] = []
        self._last: tuple[Tensor, int] | None = None

    def step(self, latents: Tensor, prediction: Tensor, index: int) -> Tensor:
        """The latents after that step; steps come in their order."""
        finished = self._points.finished(latents, prediction, index)
        sample = latents
        if self._last is not None:
            before, order = self._last
            sample = self._moved(before, index - 1, order, corrected_by=finished)
        self._known = [*self._known, finished][-self._order :]
        order = min(self._order, len(self._known))
        if self._ends_low:
            order = min(order, len(self._points.timesteps) - index)
        self._last = (sample, order)
        return self._moved(sample, index, order)

    def _moved(
        self, x: Tensor, index: int, order: int, *, corrected_by: Tensor | None = None
    ) -> Tensor:
        """From point `index` to the next, by predictions at it and before it, and perhaps by the
        one at the end."""
        alpha, sigma = self._points.point(index + 1)
        h = self._points.log_ratio(index + 1) - self._points.log_ratio(index)
        newest = self._known[-1]
        ratios = [
            (self._points.log_ratio(index - i) - self._points.log_ratio(index)) / h
            for i in range(1, order)
        ]
        slopes = [
            (known - newest) / ratio
            for known, ratio in zip(self._known[-2::-1], ratios, strict=False)
        ]
        base = sigma / self._points.point(index)[1] * x - alpha * math.expm1(-h) * newest
        weights = self._weights([*ratios, 1.0], -h, is_corrector=corrected_by is not None)
        if corrected_by is not None:
            slopes.append(corrected_by - newest)
        whole = -h if self._kind == "bh1" else math.expm1(-h)
        for weight, slope in zip(weights, slopes, strict=False):
            base = base - alpha * whole * weight * slope
        return base.to(x.dtype)

    def _weights(self, ratios: Sequence[float], hh: float, *, is_corrector: bool) -> list[float]:
        """Of the slopes: so that polynomials up to the order are integrated exactly."""
        order = len(ratios)
        if is_corrector and order == 1:
            return [0.5]
        if not is_corrector and order <= 2:
            return [0.5]
        whole = hh if self._kind == "bh1" else math.expm1(hh)
        matrix = np.asarray([[ratio**i for ratio in ratios] for i in range(order)])
        values = []
        factorial, phi = 1.0, math.expm1(hh) / hh - 1.0
        for i in range(1, order + 1):
            values.append(phi * factorial / whole)
            factorial *= i + 1
            phi = phi / hh - 1.0 / factorial
        if not is_corrector:
            matrix, values = matrix[:-1, :-1], values[:-1]
        return [float(weight) for weight in np.linalg.solve(matrix, np.asarray(values))]


class UniPCSchedule(_Multistep):
    """UniPC over the timesteps of training."""

    def __init__(
        self, config: Mapping[str, Any], num_steps: int, *, strength: float | None = None
    ) -> None:
        super().__init__(config, num_steps, strength=strength)
        self._steps = UniPCSteps(config, self)

    def step(
        self, latents: Tensor, prediction: Tensor, index: int, draw: Callable[[Tensor], Tensor]
    ) -> Tensor:
        return self._steps.step(latents, prediction, index)
