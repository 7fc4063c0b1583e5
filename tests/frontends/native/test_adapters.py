"""The routes of LoRA adapters, and the names that requests may give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sapwood.frontends.serving.adapters import AdapterRegistry
from sapwood.schema.config.lora import LoraConfig
from sapwood.schema.request import SentAdapter

CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def with_adapters(api_with: Callable[..., Any], engine: Any) -> Any:
    return api_with(adapters=AdapterRegistry(engine, LoraConfig(lora_paths="mine=/mine")))


def test_load_and_unload(with_adapters: Any, engine: Any) -> None:
    api = with_adapters
    answer = api.post("/load_lora_adapter", {"lora_name": "other", "lora_path": "/other"})
    assert answer.status_code == 200
    assert answer.json() == {
        "success": True,
        "error_message": "",
        "loaded_adapters": {"mine": "/mine", "other": "/other"},
    }
    again = api.post("/v1/load_lora_adapter", {"lora_name": "other", "lora_path": "/other"})
    assert again.status_code == 400
    assert not again.json()["success"]
    assert "loaded already" in again.json()["error_message"]
    gone = api.post("/v1/unload_lora_adapter", {"lora_name": "other", "lora_int_id": 3})
    assert gone.json()["loaded_adapters"] == {"mine": "/mine"}
    assert engine.calls == [("load_adapter", "/other"), ("unload_adapter", "/other")]
    assert api.post("/unload_lora_adapter", {"lora_name": "other"}).status_code == 400


def test_adapters_that_were_left_out_are_not_among_those_loaded(
    api_with: Callable[..., Any], engine: Any
) -> None:
    config = LoraConfig(lora_paths="mine=/mine", max_loras_per_batch=2, max_loaded_loras=2)
    api = api_with(adapters=AdapterRegistry(engine, config))
    for name in ("second", "third"):
        body = {"lora_name": name, "lora_path": f"/{name}"}
        answer = api.post("/load_lora_adapter", body)
    assert answer.json()["loaded_adapters"] == {"second": "/second", "third": "/third"}
    assert len(api.get("/v1/models").json()["data"]) == 4, "requests may name the first, too"
    assert api.post("/generate", {"text": "a", "lora_path": "mine"}).status_code == 200
    answer = api.post("/unload_lora_adapter", {"lora_name": "third"})
    assert answer.json()["loaded_adapters"] == {"mine": "/mine"}


def test_load_from_tensors(with_adapters: Any, engine: Any) -> None:
    body = {
        "lora_name": "sent",
        "config_dict": {"r": 2, "lora_alpha": 4},
        "serialized_tensors": "AQID",
        "added_tokens_config": {},
    }
    answer = with_adapters.post("/load_lora_adapter_from_tensors", body)
    assert answer.json() == {
        "success": True,
        "error_message": "",
        "loaded_adapters": {"mine": "/mine", "sent": "__tensor__"},
    }
    config = b'{"r":2,"lora_alpha":4}'
    pickled = SentAdapter(config=config, tensors=b"\x01\x02\x03", is_pickled=True)
    safe = {**body, "lora_name": "safe", "load_format": "safetensors", "serialized_tensors": ""}
    assert with_adapters.post("/load_lora_adapter_from_tensors", safe).status_code == 200
    plain = SentAdapter(config=config, tensors=b"", is_pickled=False)
    assert engine.calls == [("load_adapter", pickled), ("load_adapter", plain)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"serialized_tensors": "no base64!"}, "serialized_tensors is no base64"),
        ({"load_format": "flattened_bucket"}, "load_format"),
        ({"added_tokens_config": {"<new>": 7}}, "added_tokens_config"),
        ({"config_dict": "{}"}, "config_dict"),
    ],
)
def test_wrong_tensors_are_refused(
    with_adapters: Any, engine: Any, changes: dict[str, Any], message: str
) -> None:
    body = {"lora_name": "a", "config_dict": {}, "serialized_tensors": "", **changes}
    answer = with_adapters.post("/load_lora_adapter_from_tensors", body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert not engine.calls


def test_a_server_without_adapters_says_how_to_have_them(api: Any) -> None:
    answer = api.post("/load_lora_adapter", {"lora_name": "a", "lora_path": "/a"})
    assert answer.status_code == 400
    assert "--enable-lora" in answer.json()["error"]["message"]
    answer = api.post("/generate", {"text": "a", "lora_path": "a"})
    assert answer.status_code == 400
    assert "--enable-lora" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a", "lora_path": "mine"}),
        ("/generate", {"text": "a", "model": "org/tiny:mine"}),
        ("/v1/completions", {"prompt": "a", "lora_path": "mine"}),
        ("/v1/completions", {"prompt": "a", "model": "mine"}),
        ("/v1/completions", {"prompt": "a", "model": "org/tiny: mine "}),
        ("/v1/completions", {"prompt": ["a"], "model": "org/tiny:mine", "lora_path": ["none"]}),
        ("/v1/completions", {"prompt": "a", "model": "org/tiny:", "lora_path": "mine"}),
        ("/v1/chat/completions", {"messages": CHAT, "model": "org/tiny:mine"}),
        ("/v1/chat/completions", {"messages": CHAT, "model": "org/tiny:mine", "lora_path": "none"}),
        ("/v1/responses", {"input": "a", "model": "org/tiny:mine"}),
        ("/v1/messages", {"messages": CHAT, "model": "org/tiny:mine", "max_tokens": 5}),
        ("/api/generate", {"prompt": "a", "model": "mine:latest"}),
        ("/api/chat", {"messages": CHAT, "model": "org/tiny:mine"}),
    ],
)
def test_requests_name_an_adapter(
    with_adapters: Any, engine: Any, path: str, body: dict[str, Any]
) -> None:
    answer = with_adapters.post(path, body)
    assert answer.status_code == 200, answer.text
    assert [one.options.adapter for one in engine.submitted] == ["mine"]


@pytest.mark.parametrize(
    "body",
    [{}, {"lora_path": None}, {"lora_path": ""}, {"model": "org/tiny:"}, {"model": "default: "}],
)
def test_the_base_is_meant_where_no_adapter_is_named(
    with_adapters: Any, engine: Any, body: dict[str, Any]
) -> None:
    answer = with_adapters.post("/v1/completions", {"prompt": "a", **body})
    assert answer.status_code == 200, answer.text
    assert [one.options.adapter for one in engine.submitted] == [""]


def test_one_adapter_per_prompt(with_adapters: Any, engine: Any) -> None:
    for path, field in (("/generate", "text"), ("/v1/completions", "prompt")):
        engine.submitted.clear()
        body = {field: ["a", "b"], "lora_path": ["mine", None]}
        assert with_adapters.post(path, body).status_code == 200
        assert [one.options.adapter for one in engine.submitted] == ["mine", ""]
        body["lora_path"] = ["mine"]
        assert with_adapters.post(path, body).status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a", "lora_path": "yours"}),
        ("/v1/chat/completions", {"messages": CHAT, "model": "org/tiny:yours"}),
        ("/v1/chat/completions", {"messages": CHAT, "model": "other:mine"}),
    ],
)
def test_unknown_adapters(with_adapters: Any, path: str, body: dict[str, Any]) -> None:
    assert with_adapters.post(path, body).status_code == 404


def test_models_lists_adapters(with_adapters: Any) -> None:
    base, mine = with_adapters.get("/v1/models").json()["data"]
    assert (base["id"], base["parent"]) == ("org/tiny", None)
    assert (mine["id"], mine["root"], mine["parent"]) == ("mine", "/mine", "org/tiny")
    assert with_adapters.get("/v1/models/mine").json() == mine
    assert with_adapters.get("/v1/models/org/tiny").json() == base
    assert with_adapters.get("/v1/models/yours").status_code == 404
