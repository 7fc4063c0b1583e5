"""Options that change while the server serves, as SGLang's clients change them."""

from __future__ import annotations

from typing import Any

import pytest

from sapwood.schema.request import OrderWeights
from sapwood.schema.weights import SetLimits


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_options_change_and_the_server_says_so(api: Any, engine: Any, method: str) -> None:
    engine.options["max_queued_requests"] = 7
    body = {"server_args": {"max_queued_requests": 0, "stream_interval": 4}}
    answer = api.request(method, "/set_internal_state", json=body)
    assert (answer.status_code, answer.json()) == (200, [True])
    assert engine.calls == [OrderWeights(call_id="", order=SetLimits(max_queued_requests=0))]
    info = api.get("/server_info").json()
    assert (info["max_queued_requests"], info["stream_interval"]) == (0, 4)
    streamed = api.post("/generate", {"text": "x", "stream": True}).text
    assert 2 < streamed.count("data:") <= 6


def test_the_micro_batch_has_a_greatest_size(api: Any, engine: Any) -> None:
    body = {"server_args": {"pp_max_micro_batch_size": 4}}
    refused = api.post("/set_internal_state", body)
    assert refused.status_code == 400
    assert "--pp-size" in refused.text
    engine.options["pp_size"] = 2  # of 8 requests
    assert api.post("/set_internal_state", body).json() == [True]
    assert engine.calls[0].order == SetLimits(pp_max_micro_batch_size=4)
    body["server_args"]["pp_max_micro_batch_size"] = 5
    assert "from 1 to 4" in api.post("/set_internal_state", body).text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"server_args": {"stream_interval": 2, "page_size": 4}}', "'page_size', which cannot"),
        ('{"server_args": {"speculative_accept_threshold_acc": 0.5}}', "given at the start"),
        ('{"server_args": {"stream_interval": 2, "max_queued_requests": -1}}', "from 0 to"),
        ('{"server_args": {"stream_interval": 0}}', "whole number"),
        ('{"server_args": {"stream_interval": true}}', "whole number"),
        ('{"server_args": {"stream_interval": 2.5}}', "whole number"),
        ('{"server_args": {"stream_interval": "2"}}', "whole number"),
        ('{"server_args": {"stream_interval": %s}}' % ("9" * 5000), ""),
        ('{"server_args": {"stream_interval": 1e999}}', ""),
        ('{"server_args": {"%s": 1}}' % ("x" * 5000), "cannot change"),
        ('{"server_args": [1]}', "server_args"),
        ("{}", "server_args"),
    ],
)
def test_what_cannot_change_is_refused_by_name(
    api: Any, engine: Any, content: str, message: str
) -> None:
    """Nothing has changed then, and the answer is short."""
    headers = {"Content-Type": "application/json"}
    answer = api.request("POST", "/set_internal_state", content=content, headers=headers)
    assert answer.status_code == 400, answer.text
    assert message in answer.text
    assert len(answer.text) < 500
    assert engine.calls == []
    assert api.get("/server_info").json().get("stream_interval") is None


def test_an_engine_that_refuses_changes_nothing(api: Any, engine: Any) -> None:
    engine.refuses = True
    body = {"server_args": {"max_queued_requests": 1, "stream_interval": 4}}
    assert api.post("/set_internal_state", body).status_code == 400
    assert "stream_interval" not in api.get("/server_info").json()
