"""Whatever a field holds, the answer is an answer or a refusal in Anthropic's words."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sapwood.frontends.anthropic.protocol import (
    BLOCK_RULES,
    COUNT_RULES,
    MESSAGES_RULES,
    CountTokensRequest,
    MessagesRequest,
    TextBlock,
    Turn,
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
        assert response.json()["error"]["message"]


def named(*names):
    return st.dictionaries(st.sampled_from(sorted(names)), values, min_size=1, max_size=2)


@pytest.mark.parametrize(
    ("path", "shape", "rules", "base"),
    [
        ("/v1/messages", MessagesRequest, MESSAGES_RULES, {"max_tokens": 5}),
        ("/v1/messages/count_tokens", CountTokensRequest, COUNT_RULES, {}),
    ],
)
@bounded
@given(data=st.data())
def test_any_value_in_any_field(api, path, shape, rules, base, data):
    messages = [{"role": "user", "content": "Hi"}]
    fields = data.draw(named(*shape.__struct_fields__, *rules.unsupported))
    check(api, path, {**base, "messages": messages, **fields})


@bounded
@given(data=st.data())
def test_any_turn_and_any_block(api, data):
    blocks = st.lists(
        named(*TextBlock.__struct_fields__, *BLOCK_RULES.unsupported)
        | st.just({"type": "text", "text": "a"}),
        max_size=3,
    )
    roles = st.sampled_from(["user", "assistant", "system"])
    turn = st.fixed_dictionaries({"role": roles, "content": values | blocks})
    messages = data.draw(st.lists(turn | named(*Turn.__struct_fields__), max_size=3))
    check(api, "/v1/messages", {"max_tokens": 5, "messages": messages})
