"""The gateway's options."""

from __future__ import annotations

import pytest

from sapwood.base.errors import ConfigError
from sapwood.schema.config.gateway import GatewayConfig


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"policy": "best"}, "policy"),
        ({"cache_threshold": 1.1}, "--cache-threshold"),
        ({"balance_rel_threshold": 0.9}, "--balance-rel-threshold"),
        ({"max_tree_size": 0}, "--max-tree-size"),
        ({"health_check_interval_secs": 0.0}, "--health-check-interval-secs"),
        ({"queue_timeout_secs": -1.0}, "--queue-timeout-secs"),
        ({"queue_size": -1}, "--queue-size"),
        ({"max_concurrent_requests": 0}, "--max-concurrent-requests"),
        ({"rate_limit_tokens_per_second": 0.0}, "--rate-limit-tokens-per-second"),
        ({"health_check_endpoint": "health"}, "--health-check-endpoint"),
        ({"request_id_headers": " , "}, "--request-id-headers"),
        ({"prometheus_port": 70000}, "--prometheus-port"),
        ({"max_request_bytes": 0}, "--max-request-bytes"),
        ({"mcp_max_rounds": 0}, "--mcp-max-rounds"),
        ({"mcp_call_timeout_secs": 0.0}, "--mcp-call-timeout-secs"),
        ({"mcp_config_path": "x", "history_backend": "none"}, "--history-backend"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        GatewayConfig(**options)  # type: ignore[arg-type]


def test_addresses_are_separated_by_commas_or_spaces() -> None:
    config = GatewayConfig(worker_urls="http://a:1, http://b:2 http://c:3,")
    assert config.urls == ("http://a:1", "http://b:2", "http://c:3")


def test_names_of_requests_are_looked_for_in_lower_case() -> None:
    assert GatewayConfig(request_id_headers="X-Id, trace").id_headers == (b"x-id", b"trace")
