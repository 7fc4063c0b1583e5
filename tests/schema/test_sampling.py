from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.schema.grammar import Grammar
from sapwood.schema.limits import DISALLOWED_TOKENS, STOP_CHARACTERS, STOPS
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.thinking import ThinkingBudget

OUT_OF_RANGE = [
    ("max_new_tokens", -1, "[0, inf)"),
    ("temperature", -0.1, "[0.0, 1000000.0]"),
    ("temperature", float("nan"), "[0.0, 1000000.0]"),
    ("top_k", 0, "[1, inf)"),
    ("top_p", 0.0, "(0.0, 1.0]"),
    ("top_p", 1.01, "(0.0, 1.0]"),
    ("min_p", -0.5, "[0.0, 1.0]"),
    ("frequency_penalty", 2.5, "[-2.0, 2.0]"),
    ("presence_penalty", float("inf"), "[-2.0, 2.0]"),
    ("repetition_penalty", 0.0, "(0.0, 2.0]"),
    ("seed", 2**64, f"[{-(2**63)}, {2**64 - 1}]"),
]


@pytest.mark.parametrize(("name", "value", "limits"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_named_with_its_range(name: str, value: float, limits: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert caught.value.message == f"{name} is {value} but must be in {limits}"


def test_min_new_tokens_may_not_exceed_max_new_tokens() -> None:
    with pytest.raises(InvalidRequest, match=r"min_new_tokens is 5 but must be in \[0, 4\]"):
        SamplingParams(max_new_tokens=4, min_new_tokens=5)


@pytest.mark.parametrize("name", ["stop", "stop_regex"])
def test_stops_are_bounded(name: str) -> None:
    SamplingParams(**{name: ("a",) * STOPS.most})
    with pytest.raises(InvalidRequest, match=f"{name} has {STOPS.most + 1} entries"):
        SamplingParams(**{name: ("a",) * (STOPS.most + 1)})


def test_parameters_of_no_processor_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(custom_params={"a": 1})
    assert caught.value.param == "custom_params"


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"token_ids": []},
        {"token_ids": "x"},
        {"token_ids": [True]},
        {"token_ids": [1], "a": 1},
        {"token_ids": [1] * (DISALLOWED_TOKENS.most + 1)},
    ],
)
def test_disallowed_tokens_must_be_a_list_of_ids(params: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"at least one token id|at most") as caught:
        SamplingParams(custom_logit_processor="disallowed_tokens", custom_params=params)
    assert caught.value.param == "custom_params"


def test_every_field_that_has_token_ids_tells_them() -> None:
    params = SamplingParams(
        logit_bias={1: 1.0},
        allowed_token_ids=(7,),
        stop_token_ids=(2,),
        custom_logit_processor="disallowed_tokens",
        custom_params={"token_ids": [3]},
        thinking_budget=ThinkingBudget(max_tokens=1, begin=(4,), end=(5,), forced=(6, 5)),
    )
    told = {name: list(ids) for name, ids in params.token_ids()}
    assert told == {
        "logit_bias": [1],
        "allowed_token_ids": [7],
        "stop_token_ids": [2],
        "custom_params": [3],
        "thinking_budget": [6, 5],
    }


def test_they_cross_processes_unchanged() -> None:
    params = SamplingParams(
        stop_regex=("a+",),
        custom_logit_processor="mine",
        custom_params={"token_ids": [1, 2], "nested": {"a": [None, 1.5, "x"]}},
    )
    encoded = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(encoded, type=SamplingParams) == params


def test_stop_strings_are_bounded_together():
    SamplingParams(stop=("a" * (STOP_CHARACTERS.most - 1), "b"))
    with pytest.raises(InvalidRequest, match=f"at most {STOP_CHARACTERS.most}") as caught:
        SamplingParams(stop=("a" * STOP_CHARACTERS.most, "b"))
    assert caught.value.param == "stop"


def test_allowed_tokens_are_not_beside_a_grammar() -> None:
    assert dict(SamplingParams(allowed_token_ids=(3,)).token_ids())["allowed_token_ids"] == (3,)
    with pytest.raises(InvalidRequest, match="allowed_token_ids and a grammar both") as caught:
        SamplingParams(allowed_token_ids=(3,), grammar=Grammar(kind="regex", text="a"))
    assert caught.value.param == "allowed_token_ids"
