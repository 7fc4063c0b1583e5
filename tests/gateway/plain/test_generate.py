"""Reads what a plain engine tells of a request."""

import json

import msgspec
import pytest

from sapwood.gateway.plain.generate import GenerateEvents
from sapwood.schema.request import Generate


@pytest.mark.parametrize(
    ("told", "tiers"),
    [
        ({}, (0, 0)),
        ({"cached_tokens_details": None}, (0, 0)),
        ({"cached_tokens_details": {"device": 4, "host": 3, "storage": 2}}, (3, 2)),
        ({"cached_tokens_details": {"device": 4, "host": 3, "storage_backend": "file"}}, (3, 0)),
    ],
)
def test_cached_tokens_by_tier_are_passed_on(told: dict[str, object], tiers: object) -> None:
    request = msgspec.convert({"request_id": "r", "prompt_ids": [1], "options": {}}, Generate)
    meta = {"completion_tokens": 1, "cached_tokens": 9, **told}
    event = {"output_ids": [7], "meta_info": meta}
    (output,) = GenerateEvents(request).feed(b"data: " + json.dumps(event).encode() + b"\n\n")
    assert (output.num_cached_tokens, output.tier_tokens) == (9, tiers)
