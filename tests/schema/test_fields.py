from __future__ import annotations

import msgspec
import pytest

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.schema.fields import Alias, FieldTable, NotOffered, TokenId, parse


class Shape(msgspec.Struct, kw_only=True):
    size: int
    ids: list[TokenId] = []


TABLE = FieldTable(
    title="a test",
    shape=Shape,
    aliases={"length": Alias(of="size", idle=(-1,)), "width": Alias(of="size")},
    changes_nothing={"user": "nobody asks"},
    not_offered={
        "logprobs": NotOffered(why="none are told"),
        "mode": NotOffered(why="there is one", idle=("text",)),
        "rank": NotOffered(why="there is one", idle=(0,)),
        "reasoning": NotOffered(why="reasoning is always told", idle=(True,)),
        "cut": NotOffered(why="nothing is cut", idle=(True, False)),
    },
)


def test_null_is_absent_everywhere():
    body = {"size": 1, "ids": None, "logprobs": None, "whatever": None}
    assert parse(body, TABLE).ids == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"size": 1, "length": 2}, "length"),
        ({"width": 1, "length": 2}, "length"),
        ({"length": 2, "width": 1}, "width"),
        ({"length": "many"}, "length"),
    ],
)
def test_two_names_of_a_field_must_agree(body, param):
    assert parse({"size": 1, "width": 1, "length": -1}, TABLE).size == 1
    with pytest.raises(InvalidRequest) as refused:
        parse(body, TABLE)
    assert refused.value.param == param


def test_a_name_is_in_a_table_once():
    with pytest.raises(ValueError, match="size in the table twice"):
        FieldTable(title="a test", shape=Shape, changes_nothing={"size": "it does"})


@pytest.mark.parametrize("value", [False, "", [], {}])
def test_empty_values_ask_for_nothing(value):
    assert parse({"size": 1, "logprobs": value}, TABLE).size == 1


def test_false_asks_for_something_where_true_does_not():
    assert parse({"size": 1, "reasoning": True, "cut": True}, TABLE).size == 1
    assert parse({"size": 1, "reasoning": "", "cut": False}, TABLE).size == 1
    for value in (False, [True, False]):
        with pytest.raises(UnsupportedFeature, match="reasoning is always told"):
            parse({"size": 1, "reasoning": value}, TABLE)


def test_zero_is_not_false():
    with pytest.raises(UnsupportedFeature, match="logprobs"):
        parse({"size": 1, "logprobs": 0}, TABLE)


def test_a_refusal_says_which_value_is_accepted():
    assert parse({"size": 1, "mode": "text"}, TABLE).size == 1
    with pytest.raises(UnsupportedFeature, match='set it to "text"'):
        parse({"size": 1, "mode": "audio"}, TABLE)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "outer[2].size"),
        ({"size": None}, "outer[2].size"),
        ({"size": "x"}, "outer[2].size"),
        ({"size": 1, "ids": [0, 2**31]}, "outer[2].ids[1]"),
        ({"size": 1, "sise": 2}, "outer[2].sise"),
        ({"size": 1, "logprobs": 3}, "outer[2].logprobs"),
    ],
)
def test_errors_name_the_whole_path(body, param):
    with pytest.raises(InvalidRequest) as refused:
        parse(body, TABLE, where="outer[2]")
    assert refused.value.param == param
    assert param in refused.value.message
