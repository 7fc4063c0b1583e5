"""The HTTP server."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(30000, "Port to listen on; 0: a free one, printed.")
    log_level: str = option("info", "Least severe log messages to print.", choices=LOG_LEVELS)
    drain_timeout: float = option(
        30.0, "After SIGTERM, open requests may run on for this long.", unit="seconds"
    )
    start_timeout: float = option(
        600.0, "Give up if the engine is not ready after this long.", unit="seconds"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port} but must be from 0 to 65535")
        for name in ("drain_timeout", "start_timeout"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be >= 0 seconds")
