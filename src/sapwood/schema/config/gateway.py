"""The gateway: its workers, how it chooses among them, and how it deals with their failures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sapwood.base.errors import ConfigError
from sapwood.schema.config.gateway_tokenizing import TokenizingConfig
from sapwood.schema.config.listening import check_seconds
from sapwood.schema.config.options import option

POLICIES = (
    "random",
    "round_robin",
    "power_of_two",
    "cache_aware",
    "prefix_hash",
    "consistent_hashing",
    "bounded_load",
    "manual",
    "bucket",
)
POLICY_PLUGINS = "sapwood.gateway_policies"
"""Entry points by which packages add policies (docs/gateway.md)."""
ROLES = ("user", "admin")
HISTORY_BACKENDS = ("sqlite", "memory", "postgres", "redis", "none")
ASSIGNMENT_MODES = ("random", "min_load", "min_group")

_SECONDS = (
    "bucket_adjust_interval_secs",
    "worker_startup_timeout_secs",
    "queue_timeout_secs",
    "cb_timeout_duration_secs",
    "stream_idle_timeout_secs",
)
_POSITIVE = (
    "worker_startup_check_interval",
    "health_check_interval_secs",
    "health_check_timeout_secs",
    "worker_connect_timeout_secs",
    "request_timeout_secs",
    "max_idle_secs",
    "retry_initial_backoff_ms",
    "retry_max_backoff_ms",
    "history_retention_days",
    "wasm_timeout_secs",
    "wasm_max_memory_bytes",
    "mcp_call_timeout_secs",
    "mcp_max_result_bytes",
)
_AT_LEAST_1 = (
    "max_tree_size",
    "prefix_token_count",
    "health_failure_threshold",
    "health_success_threshold",
    "cb_failure_threshold",
    "cb_success_threshold",
    "postgres_pool_max",
    "redis_pool_max",
    "mcp_max_rounds",
)
_FACTORS = (
    "balance_rel_threshold",
    "prefix_hash_load_factor",
    "retry_backoff_multiplier",
)
_NOT_NEGATIVE = ("balance_abs_threshold", "queue_size", "retry_max_retries", "retry_budget_ratio")
_SHARES = ("cache_threshold", "retry_jitter_factor")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig(TokenizingConfig):
    worker_urls: str = option(
        "",
        "Addresses of the engines, such as http://10.0.0.7:30000, separated by commas. More can be "
        "added at run time by POST /workers.",
    )
    worker_api_key: str | None = option(
        None,
        "Key that the engines of --worker-urls ask for; default: a client's own key is passed on "
        "where --api-key asks for none.",
        secret=True,
    )
    worker_ca_certs: str | None = option(
        None,
        "PEM file of the authorities that sign the certificates of https:// workers; default: "
        "those that this machine trusts.",
    )
    worker_certfile: str | None = option(
        None,
        "PEM file with the certificate, and those of its chain, by which https:// workers know the "
        "gateway; default: it brings none.",
    )
    worker_keyfile: str | None = option(
        None, "PEM file with that certificate's private key; default: it is in --worker-certfile."
    )
    pd_disaggregation: bool = option(
        False,
        "The workers are SGLang's engines of two kinds, --prefill and --decode: each request goes "
        "to one of either, which read its prompt and generate its answer.",
    )
    prefill: str = option(
        "",
        "Address of an engine that reads prompts, and the port on which engines that generate ask "
        "it for keys and values (default: the engines' own); may be given several times.",
        many=True,
    )
    decode: str = option(
        "", "Address of an engine that generates; may be given several times.", many=True
    )
    service_discovery: bool = option(
        False,
        "Find workers in Kubernetes: the ready pods that --selector names are the workers.",
    )
    selector: str = option(
        "",
        "Labels of the pods that are workers, as KEY=VALUE, separated by blanks; a pod must have "
        "all of them.",
        many=True,
    )
    prefill_selector: str = option(
        "",
        "Labels of the pods that read prompts, with --pd-disaggregation. Their annotation "
        "sglang.ai/bootstrap-port is their bootstrap port.",
        many=True,
    )
    decode_selector: str = option(
        "", "Labels of the pods that generate, with --pd-disaggregation.", many=True
    )
    service_discovery_port: int = option(80, "Port on which these pods listen.", unit="port")
    service_discovery_namespace: str | None = option(
        None, "Namespace in which pods are looked for; default: all that the gateway may read."
    )
    policy: str = option(
        "cache_aware",
        "Rule that chooses a worker for each request.",
        choices=POLICIES,
        plugins=POLICY_PLUGINS,
    )
    prefill_policy: str | None = option(
        None,
        "Rule that chooses among the engines of --prefill; default: --policy.",
        choices=POLICIES,
        plugins=POLICY_PLUGINS,
    )
    decode_policy: str | None = option(
        None,
        "Rule that chooses among the engines of --decode; default: --policy.",
        choices=POLICIES,
        plugins=POLICY_PLUGINS,
    )
    cache_threshold: float = option(
        0.3,
        "cache_aware: a worker is chosen for what its cache holds if that is more than this share "
        "of the prompt, from 0 to 1.",
    )
    balance_abs_threshold: int = option(
        64,
        "cache_aware and bucket: workers count as unbalanced if their numbers of open requests "
        "differ by more than this, and by more than --balance-rel-threshold.",
        unit="requests",
    )
    balance_rel_threshold: float = option(
        1.5,
        "cache_aware and bucket: workers count as unbalanced if the most loaded one has more than "
        "this many times the least loaded one's requests; then the latter is chosen.",
    )
    max_tree_size: int = option(
        2**26,
        "cache_aware: size of the tree of prompts; the prompts that were used least recently "
        "are forgotten.",
        unit="bytes",
    )
    follow_kv_events: bool = option(
        False,
        "cache_aware: follow the events of engines that publish what their caches hold "
        "(--kv-events-config of sapwood serve, or SGLang's), and choose by them for requests "
        "that bring token ids. Needs pyzmq.",
    )
    prefix_token_count: int = option(
        256,
        "prefix_hash and bounded_load: prompts that agree in so many tokens at their beginning go "
        "to the same worker; the gateway counts four bytes as one token.",
        unit="tokens",
    )
    prefix_hash_load_factor: float = option(
        1.25,
        "prefix_hash and bounded_load: a worker takes at most this many times the average of open "
        "requests; what exceeds that goes to the next worker.",
    )
    assignment_mode: str = option(
        "random",
        "manual: how a new routing key gets its worker: any one, the least loaded one, or the one "
        "with the fewest keys.",
        choices=ASSIGNMENT_MODES,
    )
    max_idle_secs: float = option(
        14400.0, "manual: a routing key that is not used for so long is forgotten.", unit="seconds"
    )
    bucket_adjust_interval_secs: float = option(
        5.0,
        "bucket: how often the lengths of prompts are divided anew among the workers.",
        unit="seconds",
    )
    worker_startup_timeout_secs: float = option(
        1800.0, "A new worker that is not healthy after so long has failed.", unit="seconds"
    )
    worker_startup_check_interval: float = option(
        2.0, "Time between the health checks of a worker that starts.", unit="seconds"
    )
    health_check_interval_secs: float = option(
        60.0, "Time between two health checks of a worker.", unit="seconds"
    )
    health_check_timeout_secs: float = option(
        30.0, "A health check without an answer after so long has failed.", unit="seconds"
    )
    health_failure_threshold: int = option(
        3,
        "So many failed health checks in a row make a worker unhealthy: it gets no requests, and "
        "those that wait for its answer are sent to another worker.",
    )
    health_success_threshold: int = option(
        2, "So many good health checks in a row make an unhealthy worker healthy."
    )
    health_check_endpoint: str = option("/health", "Path that health checks ask for.")
    disable_health_check: bool = option(
        False, "Take all workers for healthy; only circuit breakers watch them."
    )
    disable_circuit_breaker: bool = option(
        False, "Send requests to a worker however often it fails."
    )
    cb_failure_threshold: int = option(
        10, "So many failures in a row open a worker's circuit breaker: it gets no requests."
    )
    cb_success_threshold: int = option(
        3, "So many trial requests in a row must succeed to close a circuit breaker."
    )
    cb_timeout_duration_secs: float = option(
        60.0, "An open circuit breaker lets a trial request through after so long.", unit="seconds"
    )
    disable_retries: bool = option(False, "Pass on the first failure of each request.")
    retry_max_retries: int = option(
        5, "A request is sent again at most so often, and never after the first byte of an answer."
    )
    retry_initial_backoff_ms: float = option(
        50.0, "Wait before a request is sent again for the first time.", unit="milliseconds"
    )
    retry_max_backoff_ms: float = option(
        30000.0, "Longest wait before a request is sent again.", unit="milliseconds"
    )
    retry_backoff_multiplier: float = option(
        1.5, "Each wait before a request is sent again is so many times the previous one."
    )
    retry_jitter_factor: float = option(
        0.2, "Share by which these waits vary at random, from 0 to 1."
    )
    retry_budget_ratio: float = option(
        0.2,
        "In the long run at most this share of all requests is sent again (a hundred more at "
        "once), so that workers in trouble are not flooded.",
    )
    max_concurrent_requests: int = option(
        -1, "So many requests are open at the workers at most; more wait. -1: no limit."
    )
    queue_size: int = option(
        100, "So many requests may wait; more are refused with 429.", unit="requests"
    )
    queue_timeout_secs: float = option(
        60.0, "A request that has waited so long is refused with 408.", unit="seconds"
    )
    rate_limit_tokens_per_second: float | None = option(
        None,
        "So many requests per second are sent to the workers; more wait; default: no limit.",
    )
    request_timeout_secs: float = option(
        1800.0, "A request that is not answered in whole after so long is ended.", unit="seconds"
    )
    worker_connect_timeout_secs: float = option(
        10.0, "A worker that accepts no connection for so long has failed.", unit="seconds"
    )
    stream_idle_timeout_secs: float = option(
        300.0,
        "An answer that has begun is ended if nothing more of it comes for so long. 0: never.",
        unit="seconds",
    )
    request_id_headers: str = option(
        "x-request-id,x-correlation-id,x-trace-id,request-id",
        "Headers in which a client may name its request, in order of preference; workers and "
        "clients get the name in x-request-id.",
    )
    control_plane_api_keys: str = option(
        "",
        "Keys of callers with names and roles, as id:name:role:key, separated by commas; the role "
        "is user or admin. Better given in the environment than on the command line. With them, or "
        "with --jwt-issuer, every request needs a key, and those that steer need the role admin.",
        secret=True,
    )
    jwt_issuer: str | None = option(
        None,
        "Issuer (OpenID Connect) whose tokens are keys too, such as https://login.example.com; "
        "default: no tokens.",
    )
    jwt_audience: str | None = option(
        None,
        "Audience that a token must name: this gateway's name at the issuer; needed with "
        "--jwt-issuer.",
    )
    jwt_jwks_uri: str | None = option(
        None,
        "Address of the issuer's public keys; default: as its discovery document says.",
    )
    jwt_role_mapping: str = option(
        "admin=admin,user=user",
        "What a name in a token's roles, role or groups means here, as NAME=admin or NAME=user, "
        "separated by commas.",
    )
    rate_limit_per_key: float | None = option(
        None,
        "Each caller may send so many requests per second; more are refused with 429. Callers "
        "are told apart by their keys; default: no limit.",
    )
    disable_audit_logging: bool = option(
        False, "Do not log who calls the routes that steer the gateway."
    )
    history_backend: str = option(
        "sqlite",
        "Where responses and conversations are kept: sqlite, in --state-dir; memory, until the "
        "gateway ends; postgres; redis; none: each worker keeps the responses that it made.",
        choices=HISTORY_BACKENDS,
    )
    state_dir: str | None = option(
        None, "Directory of the history in SQLite; default: state/gateway in $SAPWOOD_HOME."
    )
    history_retention_days: float = option(
        30.0,
        "A response is deleted after this long, a conversation so long after its last use.",
        aliases=("redis-retention-days",),
        unit="days",
    )
    postgres_db_url: str | None = option(
        None,
        "PostgreSQL database for --history-backend postgres, as "
        "postgresql://user:password@host/name; better given in the environment.",
        secret=True,
    )
    postgres_pool_max: int = option(16, "Connections to PostgreSQL at most.")
    redis_url: str | None = option(
        None,
        "Redis for --history-backend redis and --share-state, as redis://:password@host:6379/0; "
        "better given in the environment.",
        secret=True,
    )
    redis_pool_max: int = option(16, "Connections to Redis at most.")
    share_state: bool = option(
        False,
        "Keep the sticky keys of --policy manual and the counts of --rate-limit-per-key in the "
        "Redis of --redis-url, so that several gateways share them.",
    )
    enable_wasm: bool = option(
        False, "Let modules in WebAssembly, added by POST /wasm, look at requests and answers."
    )
    wasm_timeout_secs: float = option(
        1.0, "A module's call that takes longer has failed.", unit="seconds"
    )
    wasm_max_memory_bytes: int = option(
        64 * 2**20, "Memory that a module's call may have.", unit="bytes"
    )
    mcp_config_path: str | None = option(
        None,
        "File in YAML or JSON that names MCP servers, whose tools requests for responses may use; "
        "default: no tools.",
    )
    mcp_max_rounds: int = option(
        10, "A response goes on from the results of MCP tools at most so often."
    )
    mcp_call_timeout_secs: float = option(
        60.0, "A call of an MCP tool that takes longer has failed.", unit="seconds"
    )
    mcp_max_result_bytes: int = option(
        256 * 2**10, "A call of an MCP tool whose result is longer has failed.", unit="bytes"
    )
    enable_trace: bool = option(
        False, "Send OpenTelemetry traces of requests, which the engines' traces continue."
    )
    otlp_traces_endpoint: str = option(
        "http://localhost:4318/v1/traces",
        "Where traces go: an http(s) URL for OTLP over HTTP, or HOST:PORT for OTLP over gRPC.",
    )
    prometheus_host: str = option("127.0.0.1", "Address on which /metrics is served.")
    prometheus_port: int = option(
        29000, "Port on which /metrics is served; 0: a free one, printed; -1: none.", unit="port"
    )

    def __post_init__(self) -> None:
        super(GatewayConfig, self).__post_init__()
        check_seconds(self, _SECONDS)
        for name in _POSITIVE:
            self._check(name, lambda value: value > 0 and math.isfinite(value), "a number > 0")
        for name in _AT_LEAST_1:
            self._check(name, lambda value: value >= 1, ">= 1")
        for name in _FACTORS:
            self._check(name, lambda value: 1 <= value < math.inf, "a number >= 1")
        for name in _NOT_NEGATIVE:
            self._check(name, lambda value: 0 <= value < math.inf, ">= 0")
        for name in _SHARES:
            self._check(name, lambda value: 0 <= value <= 1, "from 0 to 1")
        self._check("max_concurrent_requests", lambda n: n >= 1 or n == -1, ">= 1, or -1")
        self._check("prometheus_port", lambda port: -1 <= port <= 65535, "from -1 to 65535")
        rate = self.rate_limit_tokens_per_second
        if rate is not None and not 0 < rate < math.inf:
            raise ConfigError(f"--rate-limit-tokens-per-second is {rate} but must be > 0")
        if not self.health_check_endpoint.startswith("/"):
            raise ConfigError("--health-check-endpoint must begin with a slash, such as /health")
        self._check_callers()
        policies = (self.policy, self.prefill_policy, self.decode_policy)
        if self.follow_kv_events and "cache_aware" not in policies:
            raise ConfigError("--follow-kv-events does nothing without the policy cache_aware")
        self._check_pairs()
        self._check_discovery()
        for backend, address in (("postgres", "postgres_db_url"), ("redis", "redis_url")):
            if self.history_backend == backend and getattr(self, address) is None:
                raise ConfigError(
                    f"--history-backend {backend} needs --{address.replace('_', '-')}"
                )
        if self.share_state and self.redis_url is None:
            raise ConfigError("--share-state needs --redis-url")
        if self.share_state and "manual" not in policies and self.rate_limit_per_key is None:
            raise ConfigError(
                "--share-state does nothing without --policy manual or --rate-limit-per-key"
            )
        if self.mcp_config_path is not None and self.history_backend == "none":
            raise ConfigError(
                "--mcp-config-path needs a history, in which calls wait for approval; choose "
                "another --history-backend"
            )
        if self.worker_keyfile is not None and self.worker_certfile is None:
            raise ConfigError("--worker-keyfile does nothing without --worker-certfile; give both")
        if not self.id_headers:
            raise ConfigError("--request-id-headers must name at least one header")

    def _check_pairs(self) -> None:
        if self.pd_disaggregation:
            if self.urls:
                raise ConfigError(
                    "with --pd-disaggregation the workers are those of --prefill and --decode; "
                    "leave --worker-urls out"
                )
            _ = self.prefill_workers
            return
        for name in ("prefill", "decode", "prefill_policy", "decode_policy"):
            if getattr(self, name):
                raise ConfigError(
                    f"--{name.replace('_', '-')} does nothing without --pd-disaggregation; give "
                    "both"
                )

    def _check_discovery(self) -> None:
        names = ("selector", "prefill_selector", "decode_selector")
        if not self.service_discovery:
            for name in (*names, "service_discovery_namespace"):
                if getattr(self, name):
                    raise ConfigError(
                        f"--{name.replace('_', '-')} does nothing without --service-discovery; "
                        "give both"
                    )
            return
        self._check("service_discovery_port", lambda port: 0 < port < 65536, "from 1 to 65535")
        unused = names[:1] if self.pd_disaggregation else names[1:]
        for name in unused:
            if getattr(self, name):
                switch = "with" if self.pd_disaggregation else "without"
                raise ConfigError(
                    f"--{name.replace('_', '-')} does nothing {switch} --pd-disaggregation"
                )
        if not self.selectors:
            raise ConfigError(
                "--service-discovery needs --selector, or with --pd-disaggregation "
                "--prefill-selector and --decode-selector: the labels of the pods to use"
            )

    def _check_callers(self) -> None:
        keys = self.named_keys
        if len({id_ for id_, _, _, _ in keys}) < len(keys):
            raise ConfigError("--control-plane-api-keys has two keys with the same id")
        if len({key for _, _, _, key in keys}) < len(keys):
            raise ConfigError("--control-plane-api-keys has the same key twice")
        if self.jwt_issuer is None:
            for name in ("jwt_audience", "jwt_jwks_uri"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"--{name.replace('_', '-')} does nothing without --jwt-issuer; give both"
                    )
        elif self.jwt_audience is None:
            raise ConfigError(
                "--jwt-issuer needs --jwt-audience, or tokens that are meant for other services "
                "would open this gateway"
            )
        if not self.token_roles:
            raise ConfigError("--jwt-role-mapping names no role")
        rate = self.rate_limit_per_key
        if rate is None:
            return
        if not 0 < rate < math.inf:
            raise ConfigError(f"--rate-limit-per-key is {rate} but must be > 0")
        if self.api_key is None and not keys and self.jwt_issuer is None:
            raise ConfigError(
                "--rate-limit-per-key needs keys by which callers are told apart: give --api-key, "
                "--control-plane-api-keys or --jwt-issuer"
            )

    @property
    def named_keys(self) -> tuple[tuple[str, str, str, str], ...]:
        """(id, name, role, key) of each of --control-plane-api-keys."""
        found = []
        for number, text in enumerate(_parts(self.control_plane_api_keys), start=1):
            id_, name, role, key = (*text.split(":", 3), "", "", "")[:4]
            if not (id_ and name and key) or role not in ROLES:
                # The text holds a key: it must not come into a log.
                raise ConfigError(
                    f"entry {number} of --control-plane-api-keys is not as id:name:role:key, with "
                    "a role user or admin"
                )
            found.append((id_, name, role, key))
        return tuple(found)

    @property
    def token_roles(self) -> dict[str, str]:
        """Name in a token -> role."""
        found = {}
        for text in _parts(self.jwt_role_mapping):
            name, equals, role = text.rpartition("=")
            if not name or not equals or role not in ROLES:
                raise ConfigError(
                    f"--jwt-role-mapping has {text!r}, but each part is NAME=admin or NAME=user"
                )
            found[name] = role
        return found

    def _check(self, name: str, is_right: Callable[[Any], bool], must_be: str) -> None:
        value = getattr(self, name)
        if not is_right(value):
            raise ConfigError(f"--{name.replace('_', '-')} is {value} but must be {must_be}")

    @property
    def urls(self) -> tuple[str, ...]:
        return _parts(self.worker_urls.replace(" ", ","))

    @property
    def prefill_workers(self) -> tuple[tuple[str, int | None], ...]:
        """(address, bootstrap port) of each of --prefill; None: the engines' own default."""
        found: list[tuple[str, int | None]] = []
        for word in _words(self.prefill):
            if word.isdecimal() or word == "none":
                port = None if word == "none" else int(word[:6])
                if not found or found[-1][1] is not None or (port is not None and port > 65535):
                    raise ConfigError(
                        f"--prefill has {word!r} where an address should be, or a port that is "
                        "too large; give each address with at most one port, as http://host 8998"
                    )
                found[-1] = (found[-1][0], port)
            else:
                found.append((word, None))
        return tuple(found)

    @property
    def selectors(self) -> dict[str, str]:
        """Type of workers -> the labels of their pods, as Kubernetes writes a selector."""
        given = {
            "regular": self.selector,
            "prefill": self.prefill_selector,
            "decode": self.decode_selector,
        }
        found = {kind: ",".join(_words(text)) for kind, text in given.items() if _words(text)}
        for label in (label for text in found.values() for label in text.split(",")):
            key, equals, value = label.partition("=")
            if not (key and equals and value) or "=" in value:
                raise ConfigError(f"a selector has {label!r}, but each part must be KEY=VALUE")
        return found

    @property
    def decode_urls(self) -> tuple[str, ...]:
        return _words(self.decode)

    @property
    def id_headers(self) -> tuple[bytes, ...]:
        """In lower case, in order of preference."""
        names = (name.strip().lower() for name in self.request_id_headers.split(","))
        return tuple(name.encode("latin-1", "replace") for name in names if name)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


def _parts(text: str) -> tuple[str, ...]:
    parts = (part.strip() for part in text.split(","))
    return tuple(part for part in parts if part)
