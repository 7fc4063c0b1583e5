"""What is read of a body, whatever the body is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.gateway.routing_fields import MAX_TEXT_BYTES, RoutingFields, routing_fields


def test_the_prompt_is_taken_as_it_is_spelled() -> None:
    body = b'{"temperature":0, "messages": [ {"role":"user"} ],"model":"m\\u0065","tools":[1]}'
    assert routing_fields(body) == RoutingFields("me", b'[1][ {"role":"user"} ]')


def test_a_conversation_that_goes_on_begins_alike() -> None:
    messages = [{"role": "user", "content": "hello"}]
    one = routing_fields(json.dumps({"messages": messages}).encode()).text
    messages.append({"role": "assistant", "content": "hi"})
    other = routing_fields(json.dumps({"model": "m", "messages": messages}).encode()).text
    assert other.startswith(one[:-1])


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"7", b'{"messages"', b'{"model": 7}', b"\xff", b"[" * 100_000]
)
def test_what_cannot_be_read_is_the_workers_to_refuse(body: bytes) -> None:
    assert routing_fields(body) == RoutingFields()


def test_long_prompts_are_cut() -> None:
    body = json.dumps({"system": "x" * MAX_TEXT_BYTES, "messages": []}).encode()
    assert len(routing_fields(body).text) == MAX_TEXT_BYTES


@given(st.binary(max_size=200))
def test_no_bytes_are_an_error(body: bytes) -> None:
    assert isinstance(routing_fields(body), RoutingFields)


@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner)))
def test_any_json_is_taken(value: object) -> None:
    body = json.dumps({"prompt": value, "model": "m"}).encode()
    assert routing_fields(body).text == json.dumps(value).encode()


@pytest.mark.parametrize(
    ("fields", "ids"),
    [
        ({"input_ids": [1, 2]}, b"[1, 2]"),
        ({"prompt": [[1], [2]]}, b"[[1], [2]]"),
        ({"prompt": [1], "extra_key": None, "cache_salt": "", "model": "m"}, b"[1]"),
        ({"prompt": "[1]"}, b""),
        ({"prompt": ["text"]}, b""),
        ({"prompt": [1], "cache_salt": "tenant"}, b""),
        ({"prompt": [1], "lora_path": "poet"}, b""),
        ({"prompt": [1], "model": "m:poet"}, b""),
    ],
)
def test_token_ids_are_taken_where_all_share_a_cache(fields: object, ids: bytes) -> None:
    assert routing_fields(json.dumps(fields).encode()).ids == ids
