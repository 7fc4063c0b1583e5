"""The options of `sapwood bench gpu`."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuOptions:
    """What is measured, and for how long."""

    device: str | None = option(
        None, "Device that is measured: cuda, cuda:1 …, or cpu with --quick; default: cuda."
    )
    quick: bool = option(
        False, "Next to nothing of everything: shows that it runs, and measures nothing of worth."
    )
    budget: float = option(
        450.0, "Parts that would begin later than this are left out, and named.", unit="seconds"
    )
    peers: bool = option(True, "Measure transformers too.")

    def __post_init__(self) -> None:
        if not self.budget > 0:
            raise ConfigError(f"--budget is {self.budget} but must be > 0")
