"""The server of an engine."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema import limits
from sapwood.schema.config.listening import ListeningConfig, check_seconds
from sapwood.schema.config.options import option

UNSUPPORTED_FIELDS = ("error", "warn")
HTTP_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
RESPONSES_STORES = ("sqlite", "memory", "none")

_AT_LEAST_1 = (
    "max_json_depth",
    "max_samples_per_request",
    "max_stop_strings",
    "max_stop_length",
    "max_logprobs_per_call",
    "max_engine_restarts",
)
_HTTP_ONLY = (
    "cors_allow_origins",
    "allowed_hosts",
    "request_header_timeout",
    "request_body_timeout",
    "max_json_depth",
    "unsupported_fields",
    "responses_store",
    "responses_retention",
    "batch_concurrency",
    "batch_priority_gap",
    "fastapi_root_path",
    "log_level_http",
    "uvicorn_access_log_exclude_prefixes",
    "file_storage_path",
)
"""Options that would do nothing where gRPC is served."""
_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")
MAX_PARSER_DEPTH = 1024
"""Levels of nesting; the JSON parser itself refuses deeper texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(ListeningConfig):
    grpc_mode: bool = option(
        False,
        "Serve SGLang's gRPC service on --port instead of HTTP: token ids in, token ids out, for "
        "routers that have the tokenizer. Needs the package grpcio.",
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
    ray_address: str | None = option(
        None,
        "host:port of the Ray cluster of --placement ray, of which this machine is a node, or "
        "auto; default: one is started on this machine, which ends with the server.",
    )
    max_json_depth: int = option(
        limits.BODY_DEPTH.most,
        "A body with arrays and objects nested deeper is refused with 400.",
        unit="levels",
    )
    max_samples_per_request: int = option(
        limits.CALL_SAMPLES.most,
        "A call with more prompts times n is refused with 400.",
        unit="samples",
    )
    max_stop_strings: int = option(
        limits.CALL_STOPS.most,
        "A request with more stop strings is refused with 400.",
        unit="strings",
    )
    max_stop_length: int = option(
        limits.STOP_LENGTH.most,
        "A request with a longer stop string is refused with 400.",
        unit="characters",
    )
    max_logprobs_per_call: int = option(
        limits.LOGPROBS.most,
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

    strict_flags: bool = option(
        False,
        "Refuse flags of SGLang that are accepted although there is nothing to choose here.",
    )
    fastapi_root_path: str = option(
        "",
        "Path below which a proxy shows the server, such as /llm: requests are answered with and "
        "without it in front.",
    )
    log_level_http: str | None = option(
        None,
        "Level of the log of HTTP requests: at debug and info each one is a line; default: as "
        "--log-level debug, and nothing else.",
        choices=HTTP_LOG_LEVELS,
    )
    uvicorn_access_log_exclude_prefixes: str = option(
        "", "Paths whose requests that log leaves out, and all below them.", many=True
    )
    file_storage_path: str | None = option(
        None, "Directory for the files of /v1/files and /v1/batches; default: --state-dir."
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
        super(ServerConfig, self).__post_init__()
        check_seconds(self, ("start_timeout", "engine_restart_window"))
        if self.grpc_mode:
            self._check_grpc()
        for name in _AT_LEAST_1:
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be >= 1")
        root = self.fastapi_root_path
        if root and (not _ROOT_PATH.fullmatch(root) or ".." in root):
            raise ConfigError(
                f"--fastapi-root-path is {root!r} but must be a path such as /llm, without a slash "
                "at its end"
            )
        if self.ray_address is not None and "://" in self.ray_address:
            raise ConfigError(
                f"--ray-address is {self.ray_address}, which is Ray's client; the server must be "
                "on a node of the cluster and name its host:port, or auto"
            )
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

    @property
    def logs_access(self) -> bool:
        """Whether each HTTP request is a line of the log."""
        if self.log_level_http is None:
            return self.log_level == "debug"
        return self.log_level_http in ("debug", "info")

    @property
    def unlogged_paths(self) -> tuple[str, ...]:
        return tuple(self.uvicorn_access_log_exclude_prefixes.replace(",", " ").split())

    @property
    def root_path(self) -> str:
        return self.fastapi_root_path

    def _check_grpc(self) -> None:
        for name in _HTTP_ONLY:
            if getattr(self, name) != ServerConfig.__dataclass_fields__[name].default:
                raise ConfigError(
                    f"--{name.replace('_', '-')} concerns HTTP, which is not served with "
                    "--grpc-mode; leave one of them out"
                )
        if self.ssl_keyfile_password is not None:
            raise ConfigError(
                "--ssl-keyfile-password does not go together with --grpc-mode: gRPC reads no keys "
                "with a password; take one without"
            )
