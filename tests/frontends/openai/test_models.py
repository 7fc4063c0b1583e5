from __future__ import annotations

import pytest


def test_lists_the_served_model(api):
    body = api.get("/v1/models").json()
    [card] = body["data"]
    assert body["object"] == "list"
    assert card["id"] == "org/tiny"
    assert card["max_model_len"] == 1024
    assert card["tool_call_parser"] is None
    assert card["created"] == 1_700_000_000


def test_one_model_by_a_name_with_a_slash(api):
    assert api.get("/v1/models/org/tiny").json()["id"] == "org/tiny"


def test_another_model_is_not_found(api):
    response = api.get("/v1/models/other")
    assert response.status_code == 404
    assert response.json()["object"] == "error"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/default", "/server_info"])
def test_before_the_engine_is_ready_503(api, engine, path):
    engine.unavailable_reason = "starting"
    response = api.get(path)
    assert response.status_code == 503
    assert "retry-after" in response.headers
