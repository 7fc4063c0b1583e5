"""Whatever a field holds, the answer is an answer or a refusal in the dialect's own words."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sapwood.frontends.anthropic import protocol as anthropic
from sapwood.frontends.native import protocol as native
from sapwood.frontends.ollama import protocol as ollama
from sapwood.frontends.openai import protocol as openai

HI = [{"role": "user", "content": "Hi"}]
ENDPOINTS = {
    "/v1/chat/completions": (openai.CHAT_FIELDS, {"messages": HI}),
    "/v1/completions": (openai.COMPLETION_FIELDS, {"prompt": "Hi"}),
    "/generate": (native.GENERATE_FIELDS, {"text": "Hi"}),
    "/v1/messages": (
        anthropic.MESSAGES_FIELDS,
        {"max_tokens": 5, "messages": HI},
    ),
    "/v1/messages/count_tokens": (
        anthropic.COUNT_FIELDS,
        {"messages": HI},
    ),
    "/api/chat": (ollama.CHAT_FIELDS, {"messages": HI}),
    "/api/generate": (ollama.GENERATE_FIELDS, {"prompt": "Hi"}),
    "/api/show": (ollama.SHOW_FIELDS, {}),
    "/api/pull": (ollama.PULL_FIELDS, {}),
}

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
surrogates = st.text(st.characters(categories=["Cs"]), min_size=1, max_size=2)
json_texts = st.dictionaries(
    st.sampled_from(["const", "format", "type"]) | surrogates,
    st.recursive(
        scalars | surrogates,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(surrogates, inner),
        max_leaves=4,
    ),
).map(json.dumps)
"""JSON in a string, which the body's own parser does not look at."""
bounded = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def named(*names):
    """Objects with one or two of these fields."""
    return st.dictionaries(st.sampled_from(sorted(names)), values, min_size=1, max_size=2)


def check(api, path, body):
    response = api.post(path, body)
    assert response.status_code in (200, 400, 404), (body, response.text)
    if response.status_code != 200:
        assert message_of(path, response.json())


def message_of(path, told):
    if path.startswith("/api/"):
        return told["error"]
    is_flat = path.startswith("/v1/") and not path.startswith("/v1/messages")
    return (told if is_flat else told["error"])["message"]


@pytest.mark.parametrize("path", ENDPOINTS)
@bounded
@given(data=st.data())
def test_any_value_in_any_field(api, path, data):
    table, base = ENDPOINTS[path]
    fields = data.draw(named(*table.names))
    check(api, path, {**base, **fields})


@bounded
@given(
    given_sampling=st.dictionaries(st.sampled_from(native.NativeSampling.__struct_fields__), values)
)
def test_any_sampling_parameters(api, given_sampling):
    check(api, "/generate", {"text": "Hi", "sampling_params": given_sampling})


@bounded
@given(name=st.sampled_from(["json_schema", "structural_tag"]), text=json_texts)
def test_any_json_in_a_string(api, name, text):
    check(api, "/generate", {"text": "Hi", "sampling_params": {name: text}})


@bounded
@given(
    message=st.dictionaries(
        st.sampled_from(openai.Message.__struct_fields__),
        values | st.sampled_from(["user", "assistant", "tool", "function", "developer"]),
    )
)
def test_any_message_of_openai(api, message):
    check(api, "/v1/chat/completions", {"messages": [message]})


@bounded
@given(data=st.data())
def test_any_turn_and_any_block_of_anthropic(api, data):
    blocks = st.lists(
        named(*anthropic.TEXT_FIELDS.names) | st.just({"type": "text", "text": "a"}),
        max_size=3,
    )
    roles = st.sampled_from(["user", "assistant", "system"])
    turn = st.fixed_dictionaries({"role": roles, "content": values | blocks})
    messages = st.lists(turn | named(*anthropic.Turn.__struct_fields__), max_size=3)
    check(api, "/v1/messages", {"max_tokens": 5, "messages": data.draw(messages)})


@bounded
@given(data=st.data())
def test_any_options_of_ollama(api, data):
    options = data.draw(named(*ollama.OPTION_FIELDS.names))
    check(api, "/api/generate", {"prompt": "Hi", "options": options})


@bounded
@given(data=st.data())
def test_any_message_of_ollama(api, data):
    roles = st.sampled_from(["user", "assistant", "system"])
    message = st.fixed_dictionaries({"role": roles}, optional={"content": values})
    others = named(*ollama.MESSAGE_FIELDS.names)
    messages = data.draw(st.lists(message | others, max_size=3))
    check(api, "/api/chat", {"messages": messages, "stream": False})
