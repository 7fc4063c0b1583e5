"""What a server tells about itself: metrics, traces, logs, watchdogs, crash dumps."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option

LOG_FORMATS = ("text", "json")

_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_OWN_LABELS = frozenset({"model_name", "le", "gt", "quantile"})
_TWO_SIDED = "tse"
_MAX_BUCKETS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservabilityConfig:
    """Lists are written as text, separated by commas or spaces."""

    enable_metrics: bool = option(False, "Serve Prometheus metrics at /metrics.")
    metrics_compat: bool = option(
        False, "Give the metrics under SGLang's names too, for dashboards made for it."
    )
    bucket_time_to_first_token: str | None = option(
        None, "Upper bounds of the buckets of the time to the first token.", unit="seconds"
    )
    bucket_inter_token_latency: str | None = option(
        None, "Upper bounds of the buckets of the time between tokens.", unit="seconds"
    )
    bucket_e2e_request_latency: str | None = option(
        None, "Upper bounds of the buckets of a request's whole time.", unit="seconds"
    )
    prompt_tokens_buckets: str | None = option(
        None,
        "Upper bounds of the buckets of prompt lengths: numbers, or `tse MIDDLE BASE COUNT` for "
        "COUNT bounds that spread from MIDDLE by powers of BASE.",
        unit="tokens",
    )
    generation_tokens_buckets: str | None = option(
        None,
        "Upper bounds of the buckets of output lengths, written as --prompt-tokens-buckets.",
        unit="tokens",
    )
    tokenizer_metrics_custom_labels_header: str = option(
        "x-custom-labels",
        "Header that gives a request's own metric labels, as a JSON object of texts.",
        aliases=("metrics-custom-labels-header",),
    )
    tokenizer_metrics_allowed_custom_labels: str | None = option(
        None,
        "Labels that this header may set; others in it have no effect.",
        aliases=("metrics-allowed-custom-labels",),
    )
    enable_trace: bool = option(False, "Send OpenTelemetry traces of each request.")
    otlp_traces_endpoint: str = option(
        "http://localhost:4318/v1/traces",
        "Where traces go: an http(s) URL for OTLP over HTTP, or HOST:PORT for OTLP over gRPC.",
    )
    log_requests: bool = option(False, "Log each request when it comes and when it has ended.")
    log_requests_level: int = option(
        2,
        "What a request's log says. 0: ids, lengths and times; 1: sampling parameters too; 2: the "
        "first 2048 characters of prompt and output too; 3: all of them.",
    )
    log_requests_format: str = option(
        "text", "A line of text or of JSON per event.", choices=LOG_FORMATS
    )
    log_requests_target: str = option(
        "stdout", "Where the request log goes: stdout, directories (a new file each hour), or both."
    )
    export_metrics_to_file: bool = option(
        False,
        "Write a line of JSON for each request that has ended to --export-metrics-to-file-dir: "
        "its lengths, its times and its sampling parameters, without prompt and output.",
    )
    export_metrics_to_file_dir: str | None = option(
        None, "Directory of these files, a new one each hour."
    )
    decode_log_interval: int = option(
        40, "The engine logs its state every so many steps. 0: never.", unit="steps"
    )
    log_scheduler_status_interval: float = option(
        0.0,
        "Write the ids of running and waiting requests to the request log's targets this often, "
        "as JSON. 0: never.",
        unit="seconds",
    )
    watchdog_timeout: float = option(
        300.0,
        "Print every thread's stack and end the process when it has got nowhere for so long, "
        "while starting or while requests are open. 0: never.",
        unit="seconds",
    )
    soft_watchdog_timeout: float = option(
        0.0,
        "Print every thread's stack, and go on, when a process has got nowhere for so long. "
        "0: never.",
        unit="seconds",
    )
    crash_dump_folder: str | None = option(
        None,
        "When the engine fails, write the requests of the last five minutes here, prompts and "
        "outputs included; default: nothing is written.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not 0 <= self.log_requests_level <= 3:
            raise ConfigError(
                f"--log-requests-level is {self.log_requests_level} but must be from 0 to 3"
            )
        if self.export_metrics_to_file != (self.export_metrics_to_file_dir is not None):
            raise ConfigError(
                "--export-metrics-to-file and --export-metrics-to-file-dir need each other; give "
                "both or neither"
            )
        if self.decode_log_interval < 0:
            raise ConfigError(
                f"--decode-log-interval is {self.decode_log_interval} but must be >= 0"
            )
        for name in ("log_scheduler_status_interval", "watchdog_timeout", "soft_watchdog_timeout"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"{_flag(name)} is {value} but must be a finite number >= 0")
        if not self.log_targets:
            raise ConfigError("--log-requests-target is empty; give stdout or a directory")
        for name in _BUCKET_OPTIONS:
            self.buckets(name)
        self._check_labels()

    @property
    def log_targets(self) -> tuple[str, ...]:
        return _items(self.log_requests_target)

    @property
    def custom_labels(self) -> tuple[str, ...]:
        return _items(self.tokenizer_metrics_allowed_custom_labels or "")

    def buckets(self, name: str) -> tuple[float, ...] | None:
        """The upper bounds in the option called `name`, in growing order; None if it is not set."""
        text = getattr(self, name)
        if text is None:
            return None
        words = _items(text)
        try:
            if words and words[0] == _TWO_SIDED:
                middle, base, count = (float(word) for word in words[1:])
                bounds = two_sided_buckets(middle, base, int(count))
            else:
                bounds = tuple(float(word) for word in words)
        except (ValueError, OverflowError):
            bounds = ()
        if not bounds or list(bounds) != sorted(set(bounds)) or not all(map(_is_bound, bounds)):
            raise ConfigError(
                f"{_flag(name)} is {text!r} but must be growing numbers above 0, such as 0.1,0.5,1"
            )
        if len(bounds) > _MAX_BUCKETS:
            raise ConfigError(
                f"{_flag(name)} gives {len(bounds)} buckets but at most {_MAX_BUCKETS} are allowed"
            )
        return bounds

    def _check_labels(self) -> None:
        for label in self.custom_labels:
            if not _LABEL.fullmatch(label) or label.startswith("__") or label in _OWN_LABELS:
                raise ConfigError(
                    f"--tokenizer-metrics-allowed-custom-labels has {label!r}, which cannot be a "
                    "label; use letters, digits and _, and none of the metrics' own labels"
                )
        if len(set(self.custom_labels)) < len(self.custom_labels):
            raise ConfigError("--tokenizer-metrics-allowed-custom-labels has a label twice")


_BUCKET_OPTIONS = (
    "bucket_time_to_first_token",
    "bucket_inter_token_latency",
    "bucket_e2e_request_latency",
    "prompt_tokens_buckets",
    "generation_tokens_buckets",
)


def two_sided_buckets(middle: float, base: float, count: int) -> tuple[float, ...]:
    """About `count` bounds: `middle`, and middle -/+ base, base squared and so on, where above 0.

    Raises  ValueError if they would not spread
    """
    if base <= 1 or count < 1 or count > _MAX_BUCKETS:
        raise ValueError(f"base {base} must be above 1 and count {count} above 0")
    distances = [base**power for power in range(1, math.ceil(count / 2) + 1)]
    around = [
        middle,
        *(middle + distance for distance in distances),
        *(middle - distance for distance in distances),
    ]
    return tuple(sorted({bound for bound in around if bound > 0}))


def _is_bound(value: float) -> bool:
    return 0 < value < math.inf


def _items(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
