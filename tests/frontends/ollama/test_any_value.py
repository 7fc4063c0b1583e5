"""Whatever a field holds, the answer is an answer or a refusal in Ollama's words."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sapwood.frontends.ollama.protocol import (
    CHAT_RULES,
    GENERATE_RULES,
    MESSAGE_RULES,
    OPTION_RULES,
    SHOW_RULES,
    Message,
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
    OptionFields,
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
bounded = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def check(api, path, body):
    response = api.post(path, body)
    assert response.status_code in (200, 400, 404), (body, response.text)
    if response.status_code != 200:
        assert response.json()["error"]


def named(*names):
    return st.dictionaries(st.sampled_from(sorted(names)), values, min_size=1, max_size=2)


@pytest.mark.parametrize(
    ("path", "shape", "rules", "base"),
    [
        (
            "/api/chat",
            OllamaChatRequest,
            CHAT_RULES,
            {"messages": [{"role": "user", "content": "Hi"}]},
        ),
        ("/api/generate", OllamaGenerateRequest, GENERATE_RULES, {"prompt": "Hi"}),
        ("/api/show", OllamaShowRequest, SHOW_RULES, {}),
    ],
)
@bounded
@given(data=st.data())
def test_any_value_in_any_field(api, path, shape, rules, base, data):
    fields = data.draw(named(*shape.__struct_fields__, *rules.unsupported))
    check(api, path, {**base, **fields})


@bounded
@given(data=st.data())
def test_any_options(api, data):
    names = {*OptionFields.__struct_fields__, *OPTION_RULES.unsupported}
    options = data.draw(named(*names, *OPTION_RULES.informational))
    check(api, "/api/generate", {"prompt": "Hi", "options": options})


@bounded
@given(data=st.data())
def test_any_message(api, data):
    roles = st.sampled_from(["user", "assistant", "system"])
    message = st.fixed_dictionaries({"role": roles}, optional={"content": values})
    others = named(*Message.__struct_fields__, *MESSAGE_RULES.unsupported)
    messages = data.draw(st.lists(message | others, max_size=3))
    check(api, "/api/chat", {"messages": messages, "stream": False})
