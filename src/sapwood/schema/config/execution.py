"""Where and how a step is computed."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionConfig:
    """After resolution every None but `kernels` is set."""

    device: str | None = option(
        None, "Device of the model: cpu, cuda, cuda:0 …; default: the best."
    )
    num_threads: int | None = option(
        None, "Threads that compute a step on a CPU; default: the usable cores.", unit="threads"
    )
    kernels: str | None = option(
        None, "Use only this implementation of the ops; default: the fastest that can."
    )
    disable_graphs: bool = option(
        False,
        "Call a step's ops one by one, also where the kernels can run it in one call.",
        aliases=("disable-cuda-graph",),
    )
    enable_custom_logit_processor: bool = option(
        False,
        "Run code that requests bring as their custom_logit_processor. It can do whatever this "
        "process can: only for clients that are trusted with the machine.",
    )
    skip_server_warmup: bool = option(False, "Answer the first request without a warm-up step.")

    def __post_init__(self) -> None:
        check_options(self)
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"--num-threads is {self.num_threads} but must be >= 1")
