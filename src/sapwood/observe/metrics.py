"""Prometheus metrics: kept in plain numbers while the server works, named when they are read.

Reading is rare and may cost; counting happens per token and must not. So the counters are
attributes, and `Metrics.collect` builds the families that prometheus_client writes out.

Requests add up at any moment:
    num_requests = num_finished_requests + num_aborted_requests + num_refused_requests + open ones
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import psutil
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from sapwood.observe.engine_facts import (
    EngineConstants,
    EngineFacts,
    EngineRates,
    EngineState,
    PoolConstants,
    PoolFigures,
    TierFigures,
)
from sapwood.observe.histogram import Histogram, distribution
from sapwood.observe.preparing import PreparingFigures

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus's text format, which every scraper reads."""

RANK_LABEL = "dp_rank"
"""The label of metrics that each replica has for itself, where there are several."""
PREFIX = "sapwood:"
COMPAT_PREFIX = "sglang:"

COMPAT_NAMES: Mapping[str, str] = {
    name: name
    for name in (
        "prompt_tokens",
        "generation_tokens",
        "cached_tokens",
        "num_aborted_requests",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "queue_time_seconds",
        "prompt_tokens_histogram",
        "generation_tokens_histogram",
        "num_running_reqs",
        "num_queue_reqs",
        "num_used_tokens",
        "token_usage",
        "swa_token_usage",
        "mamba_usage",
        "max_total_num_tokens",
        "gen_throughput",
        "cache_hit_rate",
        "utilization",
        "new_token_ratio",
        "engine_startup_time",
        "engine_load_weights_time",
        "num_retracted_requests",
        "realtime_tokens",
        "process_cpu_seconds",
        "http_requests",
        "http_responses",
        "num_unique_running_routing_keys",
        "routing_key_running_req_count",
        "routing_key_all_req_count",
    )
} | {"num_finished_requests": "num_requests"}
"""Our name -> SGLang's for the same quantity, both without prefix and "_total".

SGLang's num_requests counts what has been processed, ours what has come in.
"""

TTFT_BOUNDS = (
    *(0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.6, 0.8),
    *(1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400),
)
ITL_BOUNDS = (
    *(0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06),
    *(0.08, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8),
)
E2E_BOUNDS = (
    *(0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80),
    *(100, 200, 400, 600, 1200, 1800, 2400),
)
QUEUE_BOUNDS = (0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
TOKEN_BOUNDS = (
    *(16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072),
    *(262144, 524288, 1048576),
)
ROUTING_KEY_BOUNDS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500)

MAX_LABEL_SETS = 1000
"""Combinations of custom label values that are kept apart; any further one counts as "other"."""
MAX_LABEL_LENGTH = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """Upper bounds of the histograms, in seconds or tokens."""

    ttft: Sequence[float] = TTFT_BOUNDS
    itl: Sequence[float] = ITL_BOUNDS
    e2e: Sequence[float] = E2E_BOUNDS
    queue_time: Sequence[float] = QUEUE_BOUNDS
    prompt_tokens: Sequence[float] = TOKEN_BOUNDS
    generation_tokens: Sequence[float] = TOKEN_BOUNDS


class RequestSeries:
    """All figures of the requests with one set of labels.

    num_failed  aborted requests that an error of the engine ended
    """

    def __init__(self, buckets: Buckets) -> None:
        self.num_requests = 0
        self.num_open = 0
        self.num_finished = 0
        self.num_aborted = 0
        self.num_failed = 0
        self.num_refused = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.ttft = Histogram(buckets.ttft)
        self.itl = Histogram(buckets.itl)
        self.e2e = Histogram(buckets.e2e)
        self.queue_time = Histogram(buckets.queue_time)
        self.prompt_lengths = Histogram(buckets.prompt_tokens)
        self.output_lengths = Histogram(buckets.generation_tokens)


class Metrics(Collector):
    """Everything that /metrics shows.

    custom_labels  names of the labels that callers may set, besides model_name
    compat         whether metrics are shown under SGLang's names too
    """

    def __init__(
        self,
        model_name: str,
        *,
        buckets: Buckets | None = None,
        custom_labels: Sequence[str] = (),
        compat: bool = False,
    ) -> None:
        self.model_name = model_name
        self.custom_labels = tuple(custom_labels)
        self.engines = [EngineState()]
        self.http_requests: Counter[tuple[str, str]] = Counter()
        self.http_responses: Counter[tuple[str, str, str]] = Counter()
        self.num_open_calls = 0
        self.preparing: PreparingFigures | None = None
        self._buckets = buckets or Buckets()
        self._compat = compat
        self._no_labels = ("",) * len(self.custom_labels)
        self._series: dict[tuple[str, ...], RequestSeries] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self.series(())

    @property
    def engine(self) -> EngineState:
        """Of the engine, or of the first replica."""
        return self.engines[0]

    def series(self, labels: tuple[str, ...]) -> RequestSeries:
        """The figures of all requests with these custom label values; (): those without any."""
        labels = labels or self._no_labels
        found = self._series.get(labels)
        if found is None:
            if len(self._series) >= MAX_LABEL_SETS:
                labels = ("other",) * len(self.custom_labels)
            found = self._series.setdefault(labels, RequestSeries(self._buckets))
        return found

    def labels_of(self, given: Mapping[str, object]) -> tuple[str, ...]:
        """The allowed labels' values among those that a caller gave; "" for any that is no text."""
        values = (given.get(name) for name in self.custom_labels)
        return tuple(value[:MAX_LABEL_LENGTH] if isinstance(value, str) else "" for value in values)

    def totals(self) -> RequestTotals:
        every = self._series.values()
        return RequestTotals(
            num_requests=sum(series.num_requests for series in every),
            num_open=sum(series.num_open for series in every),
            num_finished=sum(series.num_finished for series in every),
            num_aborted=sum(series.num_aborted for series in every),
            num_refused=sum(series.num_refused for series in every),
        )

    def exposition(self) -> bytes:
        """The body of /metrics, whose content type is CONTENT_TYPE.

        The format is never OpenMetrics: there prometheus_client 0.26 replaces the colon in our
        names by an underscore.
        """
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        # A format has no room for one name in two places, so each family is built once per name.
        for family in self._families():
            yield family.under(PREFIX)
            if self._compat and family.name in COMPAT_NAMES:
                yield family.under(COMPAT_PREFIX, COMPAT_NAMES[family.name])

    def _families(self) -> Iterator[Family]:
        yield from self._request_families()
        yield from self._http_families()
        if self.preparing is not None:
            yield from _preparing_families(self.model_name, self.preparing)
        yield from self._engine_families()

    def _request_families(self) -> Iterator[Family]:
        names = ("model_name", *self.custom_labels)
        rows = [((self.model_name, *labels), series) for labels, series in self._series.items()]
        for name, text, attribute in _REQUEST_COUNTERS:
            counts = [(labels, getattr(series, attribute)) for labels, series in rows]
            yield Family("counter", name, text, names, counts)
        opened = [(labels, series.num_open) for labels, series in rows]
        yield Family("gauge", "num_open_requests", "Requests being answered.", names, opened)
        for name, text, attribute in _REQUEST_HISTOGRAMS:
            values = [(labels, getattr(series, attribute)) for labels, series in rows]
            yield Family("histogram", name, text, names, values)

    def _http_families(self) -> Iterator[Family]:
        yield Family(
            "counter",
            "http_requests",
            "HTTP calls by route.",
            ("endpoint", "method"),
            list(self.http_requests.items()),
        )
        yield Family(
            "counter",
            "http_responses",
            "HTTP answers by route and status; 499: the client left before.",
            ("endpoint", "method", "status_code"),
            list(self.http_responses.items()),
        )
        text = "HTTP calls being answered."
        yield Family("gauge", "http_requests_active", text, (), [((), self.num_open_calls)])

    def _engine_families(self) -> Iterator[Family]:
        told = [state.facts for state in self.engines if state.facts is not None]
        cpu = [(("api",), time.process_time())]
        resident: list[tuple[tuple[str, ...], float]] = [
            (("api",), psutil.Process().memory_info().rss)
        ]
        if told:
            cpu.append((("engine",), sum(facts.cpu_seconds for facts in told)))
            resident.append((("engine",), sum(facts.resident_bytes for facts in told)))
        names, text = ("component",), "CPU seconds of each process; of all replicas' engines."
        yield Family("counter", "process_cpu_seconds", text, names, cpu)
        text = "Resident memory of each process; of all replicas' engines."
        yield Family("gauge", "process_resident_memory_bytes", text, names, resident)
        if len(self.engines) == 1:
            yield from _families_of(self.model_name, self.engine)
            return
        text = "Whether the replica serves."
        ups = [
            ((self.model_name, str(rank)), float(state.is_up))
            for rank, state in enumerate(self.engines)
        ]
        yield Family("gauge", "engine_up", text, ("model_name", RANK_LABEL), ups)
        yield from _ranked([_families_of(self.model_name, state) for state in self.engines])


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTotals:
    """Counts of requests, added up over all labels."""

    num_requests: int
    num_open: int
    num_finished: int
    num_aborted: int
    num_refused: int


@dataclass(frozen=True, slots=True)
class Family:
    """One metric before it gets a prefix; rows are (label values, number or Histogram)."""

    kind: str
    name: str
    help: str
    label_names: Sequence[str]
    rows: Sequence[tuple[tuple[str, ...], float | Histogram]]

    def under(self, prefix: str, name: str | None = None) -> Metric:
        full_name = prefix + (name or self.name)
        if self.kind == "histogram":
            histogram = HistogramMetricFamily(full_name, self.help, labels=self.label_names)
            for labels, value in self.rows:
                assert isinstance(value, Histogram)
                histogram.add_metric(labels, buckets=value.cumulative(), sum_value=value.total)
            return histogram
        family = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        metric = family(full_name, self.help, labels=self.label_names)
        for labels, value in self.rows:
            assert not isinstance(value, Histogram)
            metric.add_metric(labels, value)
        return metric


_REQUEST_COUNTERS = (
    ("num_requests", "Requests that came in.", "num_requests"),
    ("num_finished_requests", "Requests that came to their end.", "num_finished"),
    (
        "num_aborted_requests",
        "Requests that ended early: the client left, an abort, or a failure.",
        "num_aborted",
    ),
    ("num_failed_requests", "Of the aborted ones, those ended by an error.", "num_failed"),
    ("num_refused_requests", "Requests that were refused before any token.", "num_refused"),
    ("prompt_tokens", "Prompt tokens of the requests.", "prompt_tokens"),
    ("generation_tokens", "Output tokens of the requests.", "generation_tokens"),
    ("cached_tokens", "Prompt tokens that came from the prefix cache.", "cached_tokens"),
)

_REQUEST_HISTOGRAMS = (
    ("time_to_first_token_seconds", "Until a sample's first token.", "ttft"),
    ("inter_token_latency_seconds", "From one token to the next.", "itl"),
    ("e2e_request_latency_seconds", "Until a finished sample's last token.", "e2e"),
    ("queue_time_seconds", "Until the engine began with a request.", "queue_time"),
    ("prompt_tokens_histogram", "Prompt lengths in tokens.", "prompt_lengths"),
    ("generation_tokens_histogram", "Output lengths of finished samples.", "output_lengths"),
)


def _preparing_families(model_name: str, figures: PreparingFigures) -> Iterator[Family]:
    names, labels = ("model_name",), (model_name,)
    counters: tuple[tuple[str, str, float], ...] = (
        ("media_prepared", "Pictures and videos that were prepared.", figures.num_prepared),
        ("media_refused", "Pictures and videos that were refused.", figures.num_refused),
        ("media_preparing_seconds", "Time that preparing took, fetching too.", figures.seconds),
    )
    for name, text, value in counters:
        yield Family("counter", name, text, names, [(labels, value)])
    text = "Requests whose pictures and videos wait for their turn."
    yield Family("gauge", "media_preparing_queue", text, names, [(labels, figures.num_waiting)])
    text = "Requests whose pictures and videos are being prepared."
    yield Family("gauge", "media_preparing_requests", text, names, [(labels, figures.num_open)])


def _families_of(model_name: str, state: EngineState) -> Iterator[Family]:
    """One engine's metrics; none before its first report."""
    if state.facts is None or state.constants is None:
        return
    yield from engine_gauges(model_name, state.facts, state.constants, state.rates)
    yield from _engine_counters(model_name, state.facts)


def _ranked(by_rank: Sequence[Iterable[Family]]) -> Iterator[Family]:
    """The metrics of several engines, those with one name together, with the rank as a label."""
    together: dict[str, list[tuple[int, Family]]] = {}
    for rank, families in enumerate(by_rank):
        for family in families:
            together.setdefault(family.name, []).append((rank, family))
    for same in together.values():
        _, first = same[0]
        rows = [
            ((*labels, str(rank)), value) for rank, family in same for labels, value in family.rows
        ]
        yield replace(first, label_names=(*first.label_names, RANK_LABEL), rows=rows)


def engine_gauges(
    model_name: str, facts: EngineFacts, constants: EngineConstants, rates: EngineRates
) -> Iterator[Family]:
    """The engine's present state."""
    labels = (model_name,)
    used = facts.num_leased_pages * constants.page_size
    share = facts.num_leased_pages / max(facts.num_pages, 1)
    busy = facts.num_running / max(constants.max_running_requests, 1)
    hit_rate = rates.cache_hit_rate or 0.0
    simple: Iterable[tuple[str, str, float]] = (
        ("num_running_reqs", "Requests being computed.", facts.num_running),
        ("num_queue_reqs", "Requests waiting.", facts.num_waiting),
        ("num_used_tokens", "Tokens of the pages that running requests hold.", used),
        ("token_usage", "The share of the KV pool that running requests hold.", share),
        ("max_total_num_tokens", "Tokens that the KV pool holds.", constants.max_total_tokens),
        ("gen_throughput", "Output tokens per second.", rates.output_tokens_per_s),
        ("prefill_throughput", "Prompt tokens computed per second.", rates.prompt_tokens_per_s),
        ("cache_hit_rate", "Share of prompt tokens that the cache had.", hit_rate),
        ("utilization", "Running requests over --max-running-requests.", busy),
        ("new_token_ratio", "Share of outstanding output reserved.", facts.new_token_ratio),
        ("engine_startup_time", "Seconds until the engine was ready.", constants.startup_s),
        ("engine_load_weights_time", "Seconds that loading the weights took.", constants.load_s),
        (
            "num_unique_running_routing_keys",
            "Routing keys among the running requests.",
            len(facts.routing_key_running_counts),
        ),
    )
    if facts.speculated is not None:
        simple = (
            *simple,
            ("spec_accept_length", "Output tokens per step.", facts.speculated.accept_length),
            ("spec_accept_rate", "Share of right guesses.", facts.speculated.accept_rate),
            ("spec_draft_length", "Guesses per step.", facts.speculated.draft_length),
        )
    if facts.adapters is not None:
        lora = facts.adapters
        simple = (
            *simple,
            ("lora_pool_slots_used", "LoRA adapters in memory.", lora.num_used),
            ("lora_pool_slots_total", "LoRA adapters that may run at once.", lora.num_slots),
            ("lora_pool_utilization", "Share of the adapters' memory in use.", lora.utilization),
            ("lora_evictions", "Adapters that have made room for others.", lora.num_evictions),
        )
    for name, text, value in simple:
        yield Family("gauge", name, text, ("model_name",), [(labels, value)])
    yield from _pool_gauges(model_name, facts, constants)
    text = "Cache memory by owner: running requests, the prefix cache, nobody; and the weights."
    owners = [((model_name, owner), size) for owner, size in memory_by_owner(facts, constants)]
    yield Family("gauge", "memory_bytes", text, ("model_name", "owner"), owners)
    for name, counts in (
        ("routing_key_running_req_count", facts.routing_key_running_counts),
        ("routing_key_all_req_count", facts.routing_key_all_counts),
    ):
        rows = [
            ((model_name, gt, le), float(count))
            for gt, le, count in distribution(counts, ROUTING_KEY_BOUNDS)
        ]
        text = "Routing keys by how many requests they have."
        yield Family("gauge", name, text, ("model_name", "gt", "le"), rows)


def memory_by_owner(facts: EngineFacts, constants: EngineConstants) -> list[tuple[str, int]]:
    """Bytes by their holder: the weights, and the cache's pools of requests, of the prefix cache,
    and free."""
    total: Counter[str] = Counter()
    for pool, use in zip(constants.pools, facts.pools, strict=True):
        for owner, number in units_by_owner(pool, use):
            total[owner] += number * pool.unit_bytes
    return [*((owner, total[owner]) for owner in OWNERS), ("weights", constants.weight_bytes)]


OWNERS = ("requests", "prefix_cache", "free")


def units_by_owner(pool: PoolConstants, use: PoolFigures) -> list[tuple[str, int]]:
    """Pages, or slots of states, of a pool by their holder; a unit of the prefix cache that a
    running request uses counts for the requests."""
    num_cached = pool.size - use.num_leased - use.num_free
    return list(zip(OWNERS, (use.num_leased, num_cached, use.num_free), strict=True))


def _pool_gauges(
    model_name: str, facts: EngineFacts, constants: EngineConstants
) -> Iterator[Family]:
    """Every pool; the shares of window pools and states also under SGLang's names."""
    labels = ("model_name", "pool")
    pairs = list(zip(constants.pools, facts.pools, strict=True))
    shares = {pool.name: use.num_leased / max(pool.size, 1) for pool, use in pairs}
    rows = [((model_name, name), share) for name, share in shares.items()]
    text = "The share of each pool of the cache that running requests hold."
    yield Family("gauge", "cache_pool_usage", text, labels, rows)
    text = "Pages of each pool of the cache, or states, by owner."
    units = [
        ((model_name, pool.name, owner), float(number))
        for pool, use in pairs
        for owner, number in units_by_owner(pool, use)
    ]
    yield Family("gauge", "cache_pool_units", text, (*labels, "owner"), units)
    for kind, name, text in (
        ("window", "swa_token_usage", "The share of the fullest window pool that requests hold."),
        ("state", "mamba_usage", "The share of the states that running requests hold."),
    ):
        of_kind = [share for pool, share in shares.items() if pool.startswith(kind)]
        if of_kind:
            yield Family("gauge", name, text, ("model_name",), [((model_name,), max(of_kind))])


def _engine_counters(model_name: str, facts: EngineFacts) -> Iterator[Family]:
    labels = (model_name,)
    simple: tuple[tuple[str, str, float], ...] = (
        ("num_retracted_requests", "Requests that gave their pages back.", facts.num_retractions),
        (
            "num_preemptions",
            "Running requests that made room for a more urgent one.",
            facts.num_preemptions,
        ),
        ("num_steps", "Steps that the engine has made.", facts.num_steps),
    )
    if facts.kv_events is not None:
        published, dropped = facts.kv_events.num_published, facts.kv_events.num_dropped
        simple = (
            *simple,
            ("kv_events_published", "Events of the prefix cache that were sent.", published),
            ("kv_events_dropped", "Such events for which there was no room.", dropped),
        )
    media = facts.media
    if media is not None:
        simple = (
            *simple,
            ("media_encoded", "Pictures and videos that were encoded.", media.num_encoded),
            ("media_shared", "Times that vectors of a medium were found.", media.num_shared),
            ("media_encoding_seconds", "Time that encoding took.", media.encoding_s),
        )
        text = "Bytes of the vectors of pictures and videos that are kept."
        rows_of_media = [(labels, float(media.num_bytes))]
        yield Family("gauge", "media_vector_bytes", text, ("model_name",), rows_of_media)
    if facts.tiers is not None:
        simple = (*simple, *_tier_counters(facts.tiers))
        text = "Pages and states that the host has copies of."
        rows_of_host = [(labels, float(facts.tiers.num_host_pages))]
        yield Family("gauge", "host_tier_pages", text, ("model_name",), rows_of_host)
        text = "Pages and states for which the host has room."
        rows_of_slots = [(labels, float(facts.tiers.num_host_slots))]
        yield Family("gauge", "host_tier_slots", text, ("model_name",), rows_of_slots)
    for name, text, value in simple:
        yield Family("counter", name, text, ("model_name",), [(labels, value)])

    num_decoded = facts.num_computed_tokens - facts.num_prefill_tokens
    modes = (
        ("prefill_compute", facts.num_prefill_tokens),
        ("prefill_cache", facts.num_cached_tokens),
        ("decode", num_decoded),
    )
    rows = [((model_name, mode), value) for mode, value in modes]
    text = "Tokens that the engine computed, or found in its cache."
    yield Family("counter", "realtime_tokens", text, ("model_name", "mode"), rows)


def _tier_counters(tiers: TierFigures) -> tuple[tuple[str, str, float], ...]:
    """Of the tiers of the cache behind the pool."""
    return (
        ("host_hit_tokens", "Prompt tokens that came back from the host.", tiers.num_host_tokens),
        ("prefetched_tokens", "Prompt tokens from the storage tier.", tiers.num_stored_tokens),
        ("host_saved_pages", "Pages that were copied to the host.", tiers.num_saved),
        ("host_restored_pages", "Pages that came back from there.", tiers.num_restored),
        ("storage_written_pages", "Pages that the storage was given.", tiers.num_written),
        ("storage_read_pages", "Pages that were read from there.", tiers.num_read),
        ("storage_missed_pages", "Pages that were not there, or not whole.", tiers.num_missed),
        ("storage_unwritten_pages", "Pages that were not written.", tiers.num_unwritten),
        ("storage_failures", "Failures of the storage.", tiers.num_failures),
        ("storage_written_bytes", "Bytes that the storage was given.", tiers.bytes_written),
        ("storage_read_bytes", "Bytes that were read from there.", tiers.bytes_read),
        ("storage_writing_seconds", "Time that writing took.", tiers.write_s),
        ("storage_reading_seconds", "Time that reading took.", tiers.read_s),
    )
