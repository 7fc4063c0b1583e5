"""What every HTTP server of sapwood is told: where it listens, who may call, how long it waits."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option
from sapwood.schema.limits import BODY_BYTES

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListeningConfig:
    """Options that an engine's server and the gateway share."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(30000, "Port to listen on; 0: a free one, printed.")
    log_level: str = option("info", "Least severe log messages to print.", choices=LOG_LEVELS)
    drain_timeout: float = option(
        30.0, "After SIGTERM, open requests may run on for this long.", unit="seconds"
    )
    api_key: str | None = option(
        None,
        "Key that every request must bring, as `Authorization: Bearer KEY` or `x-api-key: KEY`; "
        "better given in the environment than on the command line. Health checks and metrics stay "
        "open; default: none is asked for.",
        secret=True,
    )
    admin_api_key: str | None = option(
        None,
        "Key for the routes that steer the server, such as /flush_cache and /abort_request; it "
        "opens all others too; default: the API key opens them.",
        secret=True,
    )
    allow_open_admin: bool = option(
        False,
        "Let anybody use the routes that steer the server, where it can be reached from other "
        "machines and no key is set; default: they are refused there, and open on a loopback "
        "address.",
    )
    cors_allow_origins: str = option(
        "",
        "Origins whose web pages may use the server, separated by commas or as a JSON list, such "
        "as https://app.example; *: all. Browsers get the CORS headers for them, without "
        "credentials.",
        aliases=("allowed-origins",),
    )
    allowed_hosts: str = option(
        "",
        "Names by which the server may be asked for, separated by commas, besides addresses, "
        "localhost, names without a dot and --host; *.example.com: all below it; *: any. They keep "
        "DNS rebinding out, and are not looked at where a request needs --api-key or comes by TLS.",
    )
    ssl_certfile: str | None = option(
        None,
        "PEM file with the server's certificate, and those of its chain: HTTPS; default: HTTP.",
    )
    ssl_keyfile: str | None = option(
        None, "PEM file with the certificate's private key; default: it is in --ssl-certfile."
    )
    ssl_keyfile_password: str | None = option(
        None, "Password of the private key; default: it has none.", secret=True
    )
    ssl_ca_certs: str | None = option(
        None,
        "PEM file of authorities; clients must then bring a certificate signed by one; "
        "default: clients need none.",
    )
    request_header_timeout: float = option(
        20.0,
        "A connection that has not brought a whole request head after this long is closed. "
        "0: never.",
        unit="seconds",
    )
    request_body_timeout: float = option(
        60.0,
        "A request whose body has not arrived after this long is refused with 408. 0: never.",
        unit="seconds",
    )

    max_request_bytes: int = option(
        BODY_BYTES.most, "A longer request body is refused with 413.", unit="bytes"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port} but must be from 0 to 65535")
        check_seconds(self, ("drain_timeout", "request_header_timeout", "request_body_timeout"))
        if self.max_request_bytes < 1:
            raise ConfigError("--max-request-bytes must be >= 1")
        self._check_keys()
        self._check_tls()
        self._check_origins()
        self._check_hosts()

    @property
    def logs_access(self) -> bool:
        """Whether each HTTP request is a line of the log."""
        return self.log_level == "debug"

    @property
    def unlogged_paths(self) -> tuple[str, ...]:
        """Paths whose requests that log leaves out, and all below them."""
        return ()

    @property
    def root_path(self) -> str:
        """Path below which a proxy shows the server; "": none."""
        return ""

    def _check_keys(self) -> None:
        for name in ("api_key", "admin_api_key"):
            key = getattr(self, name)
            if key is not None and (not key or not key.isascii() or not key.isprintable()):
                raise ConfigError(
                    f"--{name.replace('_', '-')} must be printable ASCII, or it fits into no header"
                )

    def _check_tls(self) -> None:
        for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
            if getattr(self, name) is not None and self.ssl_certfile is None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} does nothing without --ssl-certfile; give both"
                )

    def _check_origins(self) -> None:
        for origin in self.allowed_origins:
            if origin != "*" and ("://" not in origin or origin.count("/") != 2):
                raise ConfigError(
                    f"--cors-allow-origins has {origin!r}, but an origin is a scheme and a host, "
                    "such as https://app.example, without a path"
                )

    def _check_hosts(self) -> None:
        for name in self.host_names:
            rest = name.removeprefix("*.")
            if name != "*" and (not rest or set(rest) & set("*/: ")):
                raise ConfigError(
                    f"--allowed-hosts has {name!r}, but a host is a name such as llm.example.com "
                    "or *.example.com, without scheme, port or path"
                )

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        """As given: by commas, or as vLLM takes them, '["https://app.example"]'."""
        text = self.cors_allow_origins.strip()
        if not text.startswith("["):
            return _parts(text)
        try:
            origins = json.loads(text)
        except ValueError as error:
            raise ConfigError(
                f"--cors-allow-origins is {text}, which is no JSON: {error}"
            ) from error
        if not all(isinstance(origin, str) for origin in origins):
            raise ConfigError(f"--cors-allow-origins is {text}, but origins are strings")
        return tuple(origins)

    @property
    def host_names(self) -> tuple[str, ...]:
        return _parts(self.allowed_hosts)


def check_seconds(config: Any, names: Iterable[str]) -> None:
    """ConfigError if one of these fields is negative or not finite."""
    for name in names:
        value = getattr(config, name)
        if value < 0 or not math.isfinite(value):
            raise ConfigError(f"--{name.replace('_', '-')} must be a finite number >= 0")


def _parts(text: str) -> tuple[str, ...]:
    parts = (part.strip() for part in text.split(","))
    return tuple(part for part in parts if part)
