from __future__ import annotations

from datetime import datetime

import pytest

from sapwood.schema.weight_summary import WeightSummary

NO_FILES = {"parent_model": "", "format": "none", "quantization_level": "unknown"}
CREATED = "2023-11-14T22:13:20Z"


def test_tags_lists_the_served_model(api, api_with):
    [model] = api.get("/api/tags").json()["models"]
    digest = model.pop("digest")
    assert len(digest) == 64
    assert model == {
        "name": "org/tiny:latest",
        "model": "org/tiny:latest",
        "modified_at": CREATED,
        "size": 0,
        "details": NO_FILES,
    }
    [other] = api_with(model_path="/models/other").get("/api/tags").json()["models"]
    assert other["digest"] != digest
    [same] = api.get("/api/tags").json()["models"]
    assert same["digest"] == digest


@pytest.mark.parametrize(
    ("served", "listed"),
    [("tiny", "tiny:latest"), ("tiny:1b", "tiny:1b"), ("host:80/tiny", "host:80/tiny:latest")],
)
def test_a_listed_name_is_accepted(api_with, served, listed):
    api = api_with(model_name=served, model_type="llama")
    [model] = api.get("/api/tags").json()["models"]
    assert model["name"] == listed
    assert model["details"] == NO_FILES | {"family": "llama", "families": ["llama"]}
    for name in (served, listed):
        assert api.post("/api/show", {"model": name}).status_code == 200


WEIGHTS = WeightSummary(
    weight_format="gguf", num_bytes=98_400_000, num_parameters=134_515_008, type_name="Q4_1"
)


def test_both_lists_tell_size_and_quantization(api_with, engine):
    api = api_with(weights=WEIGHTS)
    [listed] = api.get("/api/tags").json()["models"]
    [running] = api.get("/api/ps").json()["models"]
    assert listed["size"] == 98_400_000
    assert (running["size"], running["size_vram"]) == (250_000_000, 250_000_000)
    for model in (listed, running):
        assert model["details"] == {
            "parent_model": "",
            "format": "gguf",
            "parameter_size": "134.52M",
            "quantization_level": "Q4_1",
        }
    assert listed["digest"] == running["digest"]
    engine.options = {"device": "cpu"}
    assert api.get("/api/ps").json()["models"][0]["size_vram"] == 0
    shown = api.post("/api/show", {}).json()
    assert shown["model_info"]["general.parameter_count"] == 134_515_008


@pytest.mark.parametrize(
    ("count", "shown"), [(8_030_261_248, "8.0B"), (1_000_000, "1.00M"), (2048, "2.05K")]
)
def test_the_number_of_parameters_is_shortened(api_with, count, shown):
    api = api_with(weights=WeightSummary(num_parameters=count))
    [listed] = api.get("/api/tags").json()["models"]
    assert listed["details"]["parameter_size"] == shown


@pytest.mark.parametrize("path", ["/", "/api/tags", "/api/version", "/api/ps"])
def test_head_tells_that_the_server_is_there(api, path):
    assert api.request("HEAD", path).status_code == 200


def test_show(api_with):
    defaults = {"temperature": 0.6, "repetition_penalty": 1.1}
    api = api_with(model_type="llama", default_sampling=defaults)
    body = api.post("/api/show", {"model": "org/tiny", "verbose": True}).json()
    lines = [line.split() for line in body.pop("parameters").splitlines()]
    assert lines == [["temperature", "0.6"], ["repeat_penalty", "1.1"]]
    assert body == {
        "modified_at": CREATED,
        "details": NO_FILES | {"family": "llama", "families": ["llama"]},
        "model_info": {
            "general.architecture": "llama",
            "general.basename": "org/tiny",
            "llama.context_length": 1024,
            "llama.vocab_size": 258,
        },
        "capabilities": ["completion"],
    }


def test_show_takes_the_older_field_and_defaults_to_the_served_model(api):
    assert api.post("/api/show", {"name": "org/tiny:latest"}).status_code == 200
    assert api.post("/api/show", {}).json()["model_info"]["general.architecture"] == "unknown"


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({"model": "llama3"}, 404, "llama3"),
        ({"name": "llama3"}, 404, "llama3"),
        ({"model": 5}, 400, "model"),
        ({"model": "org/tiny", "options": {"num_ctx": 5}}, 400, "options"),
        ({"modle": "org/tiny"}, 400, "did you mean 'model'"),
    ],
)
def test_show_refuses_by_name(api, body, status, named):
    response = api.post("/api/show", body)
    assert response.status_code == status
    assert named in response.json()["error"]


def test_ps_has_the_model_while_the_engine_serves(api, engine):
    [model] = api.get("/api/ps").json()["models"]
    assert model["name"] == "org/tiny:latest"
    assert model["context_length"] == 1024
    assert datetime.fromisoformat(model["expires_at"]).year == 9999
    engine.unavailable_reason = "draining"
    assert api.get("/api/ps").json() == {"models": []}


def test_version(api):
    assert api.get("/api/version").json() == {"version": "0.1.0"}


@pytest.mark.parametrize(
    ("method", "path", "named"),
    [
        ("POST", "/api/push", "--model"),
        ("POST", "/api/create", "--model"),
        ("POST", "/api/copy", "--model"),
        ("DELETE", "/api/delete", "--model"),
        ("POST", "/api/blobs/sha256:00", "--model"),
    ],
)
def test_what_is_not_offered_says_so(api, method, path, named):
    response = api.request(method, path, json={"model": "org/tiny"})
    assert response.status_code == 400
    assert f"{path} is not supported" in response.json()["error"]
    assert named in response.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/api/chat", 405), ("GET", "/api/nothing", 404), ("POST", "/api/tags", 405)],
)
def test_wrong_paths_and_methods(api, method, path, status):
    response = api.request(method, path)
    assert response.status_code == status
    assert path in response.json()["error"]


def test_the_chat_page_is_still_at_the_root(api):
    assert api.get("/").headers["content-type"].startswith("text/html")


def test_the_openapi_document_describes_the_bodies(api):
    document = api.get("/openapi.json").json()
    for path, name in (
        ("/api/chat", "OllamaChatRequest"),
        ("/api/generate", "OllamaGenerateRequest"),
        ("/api/show", "OllamaShowRequest"),
    ):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert content["schema"] == {"$ref": f"#/components/schemas/{name}"}
        assert "model" in document["components"]["schemas"][name]["properties"]
