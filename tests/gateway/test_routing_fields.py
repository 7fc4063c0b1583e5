"""What is read of a body, whatever the body is."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.gateway.routing_fields import (
    MAX_TEXT_BYTES,
    RoutingFields,
    form_fields,
    routing_fields,
)


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


def form(*parts: tuple[str, bytes], boundary: bytes = b"xyz") -> bytes:
    pieces = [
        b"--%s\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n"
        % (boundary, head.encode(), value)
        for head, value in parts
    ]
    return b"".join(pieces) + b"--%s--\r\n" % boundary


TYPE = b"multipart/form-data; boundary=xyz"


def test_the_model_of_a_form_is_found_beside_pictures() -> None:
    picture = ('name="image"; filename="model.png"', b'name="model"\r\n\r\nother' * 9)
    body = form(picture, ('name="prompt"', b"a model"), ('name="model"', b"flux"))
    assert form_fields(body, TYPE).model == "flux"
    assert form_fields(body, b'Multipart/Form-Data; charset=x; boundary="xyz"').model == "flux"
    assert form_fields(form(picture), TYPE).model is None


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", TYPE),
        (b"--xyz", TYPE),
        (b"--xyz--xyz--xyz", TYPE),
        (b"--xyz\r\n\r\n" * 1000, TYPE),
        (form(("name=model", b"\xff" * 10**6)), TYPE),
        (form(('name="model"', b"x")), b"multipart/form-data"),
        (form(('name="model"', b"x")), b"multipart/form-data; boundary=" + b"y" * 10**5),
        (b"--xyz " * 10**5, b"multipart/form-data; boundary=" + b";" * 10**5),
    ],
)
def test_a_hostile_form_costs_little(body: bytes, kind: bytes) -> None:
    start_s = time.process_time()
    model = form_fields(body, kind).model
    assert model is None or len(model) <= 2048
    assert time.process_time() - start_s < 0.5
