"""Starts the engine's process, which imports torch while the server's own imports go on."""

from __future__ import annotations

from subprocess import Popen

from sapwood.base.errors import ConfigError
from sapwood.base.process import start_module
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.parallel import LOCAL


def start_engine_process() -> Popen[bytes]:
    """Start the process. It waits for `EngineProcessArgs`, and ends when this process does."""
    return start_module("sapwood.app.building.engine_process")


def refuse_placement(config: EngineConfig) -> None:
    """ConfigError if the processes are to be elsewhere, where only a server has them."""
    if config.parallel.placement != LOCAL:
        raise ConfigError(
            f"--placement {config.parallel.placement} is for `sapwood serve`; leave it out"
        )
