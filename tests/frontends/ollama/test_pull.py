from __future__ import annotations

import pytest

from sapwood.schema.weight_summary import WeightSummary


@pytest.mark.parametrize("field", ["model", "name"])
def test_the_served_model_is_there(api, field):
    answer = api.post("/api/pull", {field: "org/tiny:latest", "stream": False})
    assert answer.json() == {"status": "success"}


def test_the_statuses_are_those_of_a_pull_without_a_download(api_with, json_lines):
    api = api_with(weights=WeightSummary(weight_format="gguf", num_bytes=5000))
    answer = api.post("/api/pull", {"model": "org/tiny", "insecure": False})
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    first, layer, *others = json_lines(answer.text)
    assert first == {"status": "pulling manifest"}
    assert (layer["total"], layer["completed"]) == (5000, 5000)
    [listed] = api.get("/api/tags").json()["models"]
    assert layer["digest"] == f"sha256:{listed['digest']}"
    assert layer["status"] == f"pulling {listed['digest'][:12]}"
    assert [one["status"] for one in others] == [
        "verifying sha256 digest",
        "writing manifest",
        "success",
    ]


def test_another_model_is_refused_with_the_way_out(api):
    answer = api.post("/api/pull", {"model": "llama3"})
    assert answer.status_code == 400
    assert "'llama3' is not served here" in answer.json()["error"]
    assert "--model" in answer.json()["error"]
