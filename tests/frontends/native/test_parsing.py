"""/parse_function_call and /separate_reasoning."""

from __future__ import annotations

import json

import pytest

from sapwood.frontends.server import inner_app
from tests.frontends.chats import changes, tools_of
from tests.text.tools.samples import TOOLS, samples_of
from tests.text.tools.spelling import SPELLERS


@pytest.mark.parametrize("name", sorted(SPELLERS))
def test_calls_of_any_format(api, name):
    for sample in samples_of(name):
        body = {"text": sample.text, "tools": tools_of(TOOLS), "tool_call_parser": name}
        answer = api.post("/parse_function_call", body).json()
        assert answer["normal_text"] == sample.content
        found = [(call["name"], json.loads(call["parameters"])) for call in answer["calls"]]
        assert found == list(sample.calls)
        assert [call["tool_index"] for call in answer["calls"]] == list(range(len(found)))


def test_thinking_of_any_format(api):
    body = {"text": "Hm.</think>Hi", "reasoning_parser": "deepseek-r1"}
    answer = api.post("/separate_reasoning", body).json()
    assert answer == {"reasoning_text": "Hm.", "text": "Hi"}


def test_the_servers_own_parsers_are_the_default(api_with):
    api = api_with(**changes("qwen25", "qwen3"))
    text = '<tool_call>{"name": "now"}</tool_call>'
    answer = api.post("/parse_function_call", {"text": text, "tools": tools_of(TOOLS)}).json()
    assert [call["name"] for call in answer["calls"]] == ["now"]
    answer = api.post("/separate_reasoning", {"text": "<think>a</think>b"}).json()
    assert answer == {"reasoning_text": "a", "text": "b"}


def test_the_documented_examples_are_answered(api, services):
    examples = {
        path: endpoint.example
        for endpoint in inner_app(services).state.endpoints
        for path in endpoint.paths
    }
    called = api.post("/parse_function_call", examples["/parse_function_call"]).json()
    assert [call["name"] for call in called["calls"]] == ["weather"]
    thought = api.post("/separate_reasoning", examples["/separate_reasoning"]).json()
    assert thought == {"reasoning_text": "An oak is a tree.", "text": "Yes."}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/parse_function_call", {"text": "x", "tools": []}, "tool_call_parser"),
        (
            "/parse_function_call",
            {"text": "x", "tools": [], "tool_call_parser": "nope"},
            "tool_call_parser",
        ),
        ("/parse_function_call", {"text": "x"}, "tools"),
        ("/parse_function_call", {"tools": []}, "text"),
        ("/separate_reasoning", {"text": "x"}, "reasoning_parser"),
        ("/separate_reasoning", {"text": "x", "reasoning_parser": "nope"}, "reasoning_parser"),
        ("/separate_reasoning", {"text": 5, "reasoning_parser": "kimi"}, "text"),
    ],
)
def test_what_is_wrong_is_refused_by_name(api, path, body, param):
    refused = api.post(path, body)
    assert refused.status_code == 400
    assert param in json.dumps(refused.json())
