"""Noise schedules by the class that scheduler_config.json names, for models that predict noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from sapwood.base.errors import ConfigError
from sapwood.base.registry import Registry
from sapwood.pipelines.interface import Schedule


class MakeSchedule(Protocol):
    def __call__(
        self, config: Mapping[str, Any], num_steps: int, *, strength: float | None = None
    ) -> Schedule: ...


SCHEDULES: dict[str, str] = {
    "DDIMScheduler": "sapwood.pipelines.noise.ddim:DDIMSchedule",
    "DPMSolverMultistepScheduler": "sapwood.pipelines.noise.multistep:DPMSolverSchedule",
    "EulerAncestralDiscreteScheduler": "sapwood.pipelines.noise.euler:EulerAncestralSchedule",
    "EulerDiscreteScheduler": "sapwood.pipelines.noise.euler:EulerSchedule",
    "LCMScheduler": "sapwood.pipelines.noise.ddim:LCMSchedule",
    "PNDMScheduler": "sapwood.pipelines.noise.ddim:PNDMSchedule",
    "UniPCMultistepScheduler": "sapwood.pipelines.noise.multistep:UniPCSchedule",
}
_TABLE: Registry[Callable[..., Schedule]] = Registry("noise schedule", SCHEDULES)


def schedule_class(config: Mapping[str, Any]) -> MakeSchedule:
    """ConfigError, with the known ones, for a schedule that nobody wrote."""
    name = str(config.get("_class_name", ""))
    if name not in SCHEDULES:
        raise ConfigError(
            f"the noise schedule {name or 'without a class'} is not implemented; known: "
            f"{', '.join(sorted(SCHEDULES))}"
        )
    return _TABLE.get(name)
