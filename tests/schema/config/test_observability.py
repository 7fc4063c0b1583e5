import pytest

from sapwood.base.errors import ConfigError
from sapwood.schema.config.observability import ObservabilityConfig, two_sided_buckets


def test_defaults_say_nothing_and_watch():
    config = ObservabilityConfig()
    assert not config.enable_metrics
    assert not config.log_requests
    assert not config.enable_trace
    assert config.watchdog_timeout == 300
    assert config.buckets("bucket_time_to_first_token") is None
    assert config.log_targets == ("stdout",)


@pytest.mark.parametrize("text", ["0.1,0.5,2", "0.1 0.5 2", "0.1, 0.5, 2"])
def test_buckets_are_numbers_with_commas_or_spaces(text):
    config = ObservabilityConfig(bucket_inter_token_latency=text)
    assert config.buckets("bucket_inter_token_latency") == (0.1, 0.5, 2.0)


def test_buckets_spread_from_a_middle():
    config = ObservabilityConfig(prompt_tokens_buckets="tse 1000 2 6")
    assert config.buckets("prompt_tokens_buckets") == (992, 996, 998, 1000, 1002, 1004, 1008)
    assert two_sided_buckets(3, 2, 4) == (1, 3, 5, 7)


@pytest.mark.parametrize(
    "fields",
    [
        {"bucket_time_to_first_token": "1,0.5"},
        {"bucket_time_to_first_token": "1,1"},
        {"bucket_time_to_first_token": "0,1"},
        {"bucket_time_to_first_token": "1,inf"},
        {"bucket_time_to_first_token": "nan"},
        {"bucket_time_to_first_token": "fast"},
        {"bucket_time_to_first_token": ""},
        {"bucket_e2e_request_latency": ",".join(map(str, range(1, 200)))},
        {"generation_tokens_buckets": "tse 1000 1 6"},
        {"generation_tokens_buckets": "tse 1000"},
        {"generation_tokens_buckets": "tse 1000 10 100000"},
        {"log_requests_level": 4},
        {"log_requests_level": -1},
        {"log_requests_format": "xml"},
        {"log_requests_target": " "},
        {"decode_log_interval": -1},
        {"watchdog_timeout": -1.0},
        {"soft_watchdog_timeout": float("inf")},
        {"tokenizer_metrics_allowed_custom_labels": "le"},
        {"tokenizer_metrics_allowed_custom_labels": "a-b"},
        {"tokenizer_metrics_allowed_custom_labels": "__name__"},
        {"tokenizer_metrics_allowed_custom_labels": "a,a"},
    ],
)
def test_what_cannot_be_is_refused_by_the_options_name(fields):
    [name] = fields
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}"):
        ObservabilityConfig(**fields)


def test_labels_and_targets_are_lists():
    config = ObservabilityConfig(
        tokenizer_metrics_allowed_custom_labels="tenant, tier",
        log_requests_target="stdout,/var/log/sapwood",
    )
    assert config.custom_labels == ("tenant", "tier")
    assert config.log_targets == ("stdout", "/var/log/sapwood")
