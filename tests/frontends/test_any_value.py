"""Whatever a field holds, the answer is an answer or a refusal, never a failure of ours."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sapwood.frontends.native.protocol import GENERATE_RULES, GenerateRequest, SamplingFields
from sapwood.frontends.openai.protocol import (
    CHAT_RULES,
    COMPLETION_RULES,
    ChatRequest,
    CompletionRequest,
    Message,
)

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
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def check(api, path, body):
    response = api.post(path, body)
    assert response.status_code in (200, 400, 404), (body, response.text)
    if response.status_code == 400:
        error = response.json().get("error", response.json())
        assert error["message"]


def names(shape, rules):
    return sorted({*shape.__struct_fields__, *rules.unsupported})


@pytest.mark.parametrize(
    ("path", "shape", "rules", "base"),
    [
        (
            "/v1/chat/completions",
            ChatRequest,
            CHAT_RULES,
            {"messages": [{"role": "user", "content": "Hi"}]},
        ),
        ("/v1/completions", CompletionRequest, COMPLETION_RULES, {"prompt": "Hi"}),
        ("/generate", GenerateRequest, GENERATE_RULES, {"text": "Hi"}),
    ],
)
@bounded
@given(data=st.data())
def test_any_value_in_any_field(api, path, shape, rules, base, data):
    fields = st.dictionaries(st.sampled_from(names(shape, rules)), values, min_size=1, max_size=2)
    check(api, path, {**base, **data.draw(fields)})


@bounded
@given(given_sampling=st.dictionaries(st.sampled_from(SamplingFields.__struct_fields__), values))
def test_any_sampling_parameters(api, given_sampling):
    check(api, "/generate", {"text": "Hi", "sampling_params": given_sampling})


@bounded
@given(name=st.sampled_from(["json_schema", "structural_tag"]), text=json_texts)
def test_any_json_in_a_string(api, name, text):
    check(api, "/generate", {"text": "Hi", "sampling_params": {name: text}})


@bounded
@given(
    message=st.dictionaries(
        st.sampled_from(Message.__struct_fields__),
        values | st.sampled_from(["user", "assistant", "tool", "function", "developer"]),
    )
)
def test_any_message(api, message):
    check(api, "/v1/chat/completions", {"messages": [message]})
