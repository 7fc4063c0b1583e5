"""The HTTP server."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option

LOG_LEVELS = ("debug", "info", "warning", "error")
UNSUPPORTED_FIELDS = ("error", "warn")
RESPONSES_STORES = ("sqlite", "memory", "none")

_SECONDS = (
    "drain_timeout",
    "start_timeout",
    "request_header_timeout",
    "request_body_timeout",
    "engine_restart_window",
)
_AT_LEAST_1 = (
    "max_request_bytes",
    "max_json_depth",
    "max_samples_per_request",
    "max_stop_strings",
    "max_stop_length",
    "max_logprobs_per_call",
    "max_engine_restarts",
)
MAX_LOGPROBS = 2**22
"""As JSON 100 to 400 MB."""
MAX_PARSER_DEPTH = 1024
"""Levels of nesting; the JSON parser itself refuses deeper texts."""


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
    restart_engine: bool = option(
        False, "Start another engine process when one has died after it had been ready."
    )
    max_engine_restarts: int = option(
        5, "Restarts within --engine-restart-window at most; then the server ends with status 1."
    )
    engine_restart_window: float = option(
        600.0, "Time over which restarts of the engine are counted.", unit="seconds"
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
        64 * 2**20, "A longer request body is refused with 413.", unit="bytes"
    )
    max_json_depth: int = option(
        100, "A body with arrays and objects nested deeper is refused with 400.", unit="levels"
    )
    max_samples_per_request: int = option(
        4096, "A call with more prompts times n is refused with 400.", unit="samples"
    )
    max_stop_strings: int = option(
        256, "A request with more stop strings is refused with 400.", unit="strings"
    )
    max_stop_length: int = option(
        1024, "A request with a longer stop string is refused with 400.", unit="characters"
    )
    max_logprobs_per_call: int = option(
        MAX_LOGPROBS,
        "A call whose answer would have more log probabilities is refused with 400: of each token, "
        "of the likeliest ones and of those asked for, over all prompts and samples. Those of "
        "output tokens count where the answer holds them until its end.",
        unit="log probabilities",
    )
    unsupported_fields: str = option(
        "error",
        "What becomes of a request with a field that asks for what the server does not do, or that "
        "it does not know: error, refused with 400; warn, answered without the field, which a "
        "header of the answer and the log name.",
        choices=UNSUPPORTED_FIELDS,
    )

    state_dir: str | None = option(
        None,
        "Directory for what outlives the server: responses, files and batches. Default: "
        "state/<model> in $SAPWOOD_HOME.",
    )
    responses_store: str = option(
        "sqlite",
        "Where the conversations of /v1/responses are kept: sqlite, in --state-dir; memory, until "
        "the server ends; none.",
        choices=RESPONSES_STORES,
    )
    responses_retention: float = option(30.0, "A response is deleted after this long.", unit="days")
    batch_concurrency: int = option(
        16,
        "Lines of /v1/batches that are answered at a time, all batches together; 0: no files and "
        "no batches.",
        unit="lines",
    )
    batch_priority_gap: int = option(
        100,
        "Lines of batches are less urgent than requests that bring no priority by so much, so that "
        "they wait behind them.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port} but must be from 0 to 65535")
        for name in _SECONDS:
            value = getattr(self, name)
            if value < 0 or not math.isfinite(value):
                raise ConfigError(f"--{name.replace('_', '-')} must be a finite number >= 0")
        for name in _AT_LEAST_1:
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be >= 1")
        if self.max_json_depth > MAX_PARSER_DEPTH:
            raise ConfigError(
                f"--max-json-depth is {self.max_json_depth} but must be at most "
                f"{MAX_PARSER_DEPTH}, what the parser takes"
            )
        for name in ("batch_concurrency", "batch_priority_gap"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)} but must be >= 0"
                )
        if not 0 < self.responses_retention < math.inf:
            raise ConfigError(
                f"--responses-retention is {self.responses_retention} but must be a finite number "
                "of days > 0"
            )
        self._check_keys()
        self._check_tls()
        self._check_origins()
        self._check_hosts()

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


def _parts(text: str) -> tuple[str, ...]:
    parts = (part.strip() for part in text.split(","))
    return tuple(part for part in parts if part)
