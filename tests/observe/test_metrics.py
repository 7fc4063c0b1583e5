from dataclasses import replace
from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from sapwood.observe.engine_facts import EngineConstants, EngineRates, EngineState, PoolConstants
from sapwood.observe.metrics import COMPAT_NAMES, MAX_LABEL_SETS, Buckets, Metrics, memory_by_owner

FACTS = SimpleNamespace(
    num_running=3,
    num_waiting=2,
    num_pages=100,
    num_free_pages=50,
    num_leased_pages=30,
    num_steps=7,
    num_computed_tokens=500,
    num_prefill_tokens=400,
    num_cached_tokens=100,
    num_output_tokens=101,
    num_retractions=1,
    num_preemptions=2,
    new_token_ratio=0.5,
    adapters=None,
    media=None,
    tiers=None,
    kv_events=None,
    speculated=None,
    cpu_seconds=2.5,
    resident_bytes=1000,
    routing_key_running_counts=(1, 2),
    routing_key_all_counts=(1, 2, 7),
    pools=(
        SimpleNamespace(num_free=50, num_leased=30),
        SimpleNamespace(num_free=10, num_leased=5),
        SimpleNamespace(num_free=0, num_leased=30),
        SimpleNamespace(num_free=1, num_leased=4),
    ),
)
CONSTANTS = EngineConstants(
    page_size=16,
    max_total_tokens=1600,
    max_running_requests=6,
    startup_s=3.0,
    load_s=1.0,
    weight_bytes=4000,
    pools=(
        PoolConstants(name="full", size=100, unit_bytes=10),
        PoolConstants(name="window_8", size=20, unit_bytes=7),
        PoolConstants(name="window_64", size=40, unit_bytes=0),
        PoolConstants(name="state", size=8, unit_bytes=100),
    ),
)


def samples(metrics: Metrics) -> dict[tuple[str, frozenset], float]:
    return {
        (one.name, frozenset(one.labels.items())): one.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for one in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset({"model_name": "m", **labels}.items())]


def with_engine(**options) -> Metrics:
    metrics = Metrics("m", **options)
    metrics.engine.facts, metrics.engine.constants = FACTS, CONSTANTS
    metrics.engine.rates = EngineRates(output_tokens_per_s=12.5)
    return metrics


def test_what_is_written_can_be_read():
    metrics = with_engine()
    metrics.series(()).num_requests = 4
    found = samples(metrics)
    assert found["sapwood:num_requests_total", frozenset({("model_name", "m")})] == 4
    assert found["sapwood:gen_throughput", frozenset({("model_name", "m")})] == 12.5


def test_engine_figures_are_named_and_in_tokens():
    metrics = with_engine()
    assert value(metrics, "sapwood:num_running_reqs") == 3
    assert value(metrics, "sapwood:num_queue_reqs") == 2
    assert value(metrics, "sapwood:num_used_tokens") == 480
    assert value(metrics, "sapwood:token_usage") == 0.3
    assert value(metrics, "sapwood:utilization") == 0.5
    assert value(metrics, "sapwood:realtime_tokens_total", mode="prefill_compute") == 400
    assert value(metrics, "sapwood:realtime_tokens_total", mode="decode") == 100
    assert value(metrics, "sapwood:memory_bytes", owner="prefix_cache") == 535
    assert value(metrics, "sapwood:num_unique_running_routing_keys") == 2


def test_gauge_histograms_do_not_add_up():
    metrics = with_engine()
    name = "sapwood:routing_key_all_req_count"
    assert value(metrics, name, gt="-Inf", le="1.0") == 1
    assert value(metrics, name, gt="1.0", le="2.0") == 1
    assert value(metrics, name, gt="5.0", le="10.0") == 1
    assert value(metrics, name, gt="500.0", le="+Inf") == 0


def test_memory_has_one_owner_per_page():
    owners = dict(memory_by_owner(FACTS, CONSTANTS))
    assert owners == {
        "requests": 300 + 35 + 400,
        "prefix_cache": 200 + 35 + 300,
        "free": 500 + 70 + 100,
        "weights": 4000,
    }


def test_guesses_show_where_there_are_some():
    metrics = with_engine()
    assert "sapwood:spec_accept_length" not in {name for name, _ in samples(metrics)}
    figures = SimpleNamespace(accept_length=2.5, accept_rate=0.75, draft_length=2.0)
    metrics.engine.facts = SimpleNamespace(**vars(FACTS) | {"speculated": figures})
    assert value(metrics, "sapwood:spec_accept_length") == 2.5
    assert value(metrics, "sapwood:spec_accept_rate") == 0.75
    assert value(metrics, "sapwood:spec_draft_length") == 2.0


def test_every_pool_shows():
    metrics = with_engine()
    name = "sapwood:cache_pool_usage"
    shares = [value(metrics, name, pool=pool.name) for pool in CONSTANTS.pools]
    assert shares == [0.3, 0.25, 0.75, 0.5]
    name = "sapwood:cache_pool_units"
    assert value(metrics, name, pool="state", owner="prefix_cache") == 3
    assert value(metrics, name, pool="window_8", owner="free") == 10
    assert value(metrics, "sapwood:swa_token_usage") == 0.75, "of the fullest"
    assert value(metrics, "sapwood:mamba_usage") == 0.5


def test_a_model_without_states_has_no_gauge_of_them():
    metrics = with_engine()
    first = (CONSTANTS.pools[:1], FACTS.pools[:1])
    metrics.engine.constants = replace(CONSTANTS, pools=first[0])
    metrics.engine.facts = SimpleNamespace(**vars(FACTS) | {"pools": first[1]})
    names = {name for name, _ in samples(metrics)}
    assert "sapwood:cache_pool_usage" in names
    assert not names & {"sapwood:mamba_usage", "sapwood:swa_token_usage"}


def test_cpu_seconds_are_per_component():
    found = samples(with_engine())
    name = "sapwood:process_cpu_seconds_total"
    assert found[name, frozenset({("component", "engine")})] == 2.5
    assert found[name, frozenset({("component", "api")})] > 0


def test_without_an_engine_there_are_only_the_request_metrics():
    names = {name for name, _ in samples(Metrics("m"))}
    assert "sapwood:num_requests_total" in names
    assert "sapwood:num_running_reqs" not in names


def test_compat_gives_sglangs_names_for_the_same_quantities():
    metrics = with_engine(compat=True)
    series = metrics.series(())
    series.num_requests, series.num_finished = 5, 3
    series.ttft.observe(0.05)
    series.itl.observe(0.01)
    found = samples(metrics)
    plain = {name for name, _ in samples(with_engine())}
    assert not any(name.startswith("sglang:") for name in plain)
    compat = {name.removeprefix("sglang:") for name, _ in found if name.startswith("sglang:")}
    for name in COMPAT_NAMES.values():
        forms = {name, f"{name}_total", f"{name}_bucket"}
        is_http = name.startswith("http_")  # has no samples before the first call
        assert is_http or forms & compat, name
    labels = frozenset({("model_name", "m")})
    # SGLang counts a request when it is done.
    assert found["sglang:num_requests_total", labels] == 3
    assert found["sapwood:num_requests_total", labels] == 5
    assert found["sglang:time_to_first_token_seconds_count", labels] == 1


def test_buckets_can_be_chosen():
    metrics = Metrics("m", buckets=Buckets(ttft=(0.5, 1.0)))
    metrics.series(()).ttft.observe(0.7)
    name = "sapwood:time_to_first_token_seconds_bucket"
    assert value(metrics, name, le="0.5") == 0
    assert value(metrics, name, le="1.0") == 1
    assert value(metrics, name, le="+Inf") == 1


def test_custom_labels_keep_series_apart():
    metrics = Metrics("m", custom_labels=("tenant", "tier"))
    labels = metrics.labels_of({"tenant": "a", "tier": 3, "evil": "x"})
    assert labels == ("a", "")
    metrics.series(labels).num_requests += 1
    metrics.series(()).num_requests += 2
    assert value(metrics, "sapwood:num_requests_total", tenant="a", tier="") == 1
    assert value(metrics, "sapwood:num_requests_total", tenant="", tier="") == 2
    assert metrics.totals().num_requests == 3


def test_label_values_are_escaped_and_bounded():
    metrics = Metrics("m", custom_labels=("tenant",))
    hostile = 'a"\n\\{}' + "x" * 500
    labels = metrics.labels_of({"tenant": hostile})
    metrics.series(labels).num_requests += 1
    assert value(metrics, "sapwood:num_requests_total", tenant=hostile[:128]) == 1


def test_a_flood_of_label_values_ends_in_other():
    metrics = Metrics("m", custom_labels=("tenant",))
    for i in range(MAX_LABEL_SETS + 50):
        metrics.series((f"t{i}",)).num_requests += 1
    assert value(metrics, "sapwood:num_requests_total", tenant="other") == 51
    assert metrics.totals().num_requests == MAX_LABEL_SETS + 50


def test_replicas_have_a_row_each_in_one_family():
    metrics = Metrics("m")
    metrics.engines.append(EngineState(facts=FACTS, constants=CONSTANTS, is_up=False))
    metrics.engine.facts, metrics.engine.constants = FACTS, CONSTANTS
    text = metrics.exposition().decode()
    assert text.count("# TYPE sapwood:num_running_reqs gauge") == 1
    for rank, is_up in (("0", "1.0"), ("1", "0.0")):
        assert f'sapwood:engine_up{{dp_rank="{rank}",model_name="m"}} {is_up}' in text
        assert f'sapwood:num_running_reqs{{dp_rank="{rank}",model_name="m"}}' in text
    cpu = FACTS.cpu_seconds * 2
    assert f'sapwood:process_cpu_seconds_total{{component="engine"}} {float(cpu)}' in text


def test_preemptions_are_counted_apart_from_retractions():
    """Review 2, number 10."""
    metrics = with_engine()
    assert value(metrics, "sapwood:num_preemptions_total") == 2
    assert value(metrics, "sapwood:num_retracted_requests_total") == 1
