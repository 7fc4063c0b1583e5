"""Every known field of every dialect: accepted where it asks for nothing, else honoured or refused
by its name; and the same in the mode that only warns."""

from __future__ import annotations

import itertools
import typing

import msgspec
import pytest

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.frontends.field_tables import FIELD_TABLES, as_markdown
from sapwood.schema.fields import parse
from sapwood.schema.unsupported import warning_only

TABLES = {table.title: table for tables in FIELD_TABLES.values() for table in tables}
ANY_VALUES = (True, 7, 0.5, "x", ["x"], {"x": 1})
SAMPLES = ("x", 7, "24h", 3600, ["x"], [7], {}, [], [{}])
"""Values of which every required field takes one."""


def _sample(one: msgspec.structs.FieldInfo) -> object:
    for value in (*typing.get_args(one.type), *SAMPLES):
        try:
            return msgspec.convert(value, one.type)
        except (msgspec.ValidationError, TypeError):
            continue
    raise AssertionError(f"no sample for {one}")


def _base(table):
    """A body with no more than it must have."""
    fields = msgspec.structs.fields(table.shape)
    return {one.name: _sample(one) for one in fields if one.required}


def _default(one):
    if one.default_factory is not msgspec.NODEFAULT:
        return one.default_factory()
    return None if one.default is msgspec.NODEFAULT else one.default


def _pairs(kind):
    return [(title, name) for title, table in TABLES.items() for name in getattr(table, kind)]


def test_titles_are_distinct():
    assert len(TABLES) == sum(map(len, FIELD_TABLES.values()))


@pytest.mark.parametrize("title", TABLES)
def test_every_honoured_field_takes_its_default(title):
    table = TABLES[title]
    base = _base(table)
    defaults = {
        one.name: msgspec.to_builtins(_default(one))
        for one in msgspec.structs.fields(table.shape)
        if not one.required
    }
    assert parse({**defaults, **base}, table) == parse(base, table)
    nulls = dict.fromkeys(table.names)
    assert parse({**nulls, **base}, table) == parse(base, table)


@pytest.mark.parametrize(("title", "name"), _pairs("left_out"))
def test_some_values_of_an_honoured_field_ask_for_nothing(title, name):
    table = TABLES[title]
    for value in table.left_out[name]:
        assert parse({**_base(table), name: value}, table) == parse(_base(table), table)


@pytest.mark.parametrize(("title", "name"), _pairs("changes_nothing"))
def test_a_field_that_changes_nothing_takes_any_value(title, name):
    table = TABLES[title]
    for value in ANY_VALUES:
        assert parse({**_base(table), name: value}, table) == parse(_base(table), table)


@pytest.mark.parametrize(("title", "name"), _pairs("not_offered"))
def test_a_field_that_is_not_offered_is_refused_by_name_unless_it_asks_for_nothing(title, name):
    table = TABLES[title]
    base = _base(table)
    listed = table.not_offered[name].idle
    off = [False, [None, False]]
    booleans = [value for value in listed if isinstance(value, bool)]
    is_on = booleans == [True]  # then false asks for something
    for idle in (None, "", [], {}, *listed, *([] if is_on else off)):
        assert parse({**base, name: idle}, table) == parse(base, table)
    others = (7, "something else", [None, "something else"], {"something": "else"})
    for value in (*others, *(off if is_on else [])):
        with pytest.raises(UnsupportedFeature) as refused:
            parse({**base, name: value}, table, where="outer[2]")
        assert refused.value.param == f"outer[2].{name}"
        assert refused.value.message.startswith(f"outer[2].{name} is not supported")
        with warning_only() as noted:
            assert parse({**base, name: value}, table, where="outer[2]") == parse(base, table)
        assert str(noted) == f"outer[2].{name}"


@pytest.mark.parametrize(("title", "name"), _pairs("aliases"))
def test_another_name_of_a_field_means_the_field(title, name):
    table = TABLES[title]
    base, alias = _base(table), table.aliases[name]
    (honoured,) = [one for one in msgspec.structs.fields(table.shape) if one.name == alias.of]
    for idle in (None, *alias.idle):
        assert parse({**base, name: idle}, table) == parse(base, table)
    takes = [value for value in (True, 7, "x", 1.5) if _converts(value, honoured.type)]
    assert takes
    for value in takes:
        asked = parse({**base, name: value}, table)
        assert asked == parse({**base, alias.of: value}, table)
        assert getattr(asked, alias.of) == value
    with pytest.raises(InvalidRequest, match=name):
        parse({**base, name: {"no": "such type"}}, table)


def _converts(value, kind):
    try:
        return msgspec.convert(value, kind) == value
    except msgspec.ValidationError:
        return False


@pytest.mark.parametrize("title", TABLES)
def test_an_unknown_field_is_refused_by_name(title):
    table = TABLES[title]
    base = _base(table)
    with pytest.raises(InvalidRequest, match=r"unknown field 'outer\.no_such_field'"):
        parse({**base, "no_such_field": 1}, table, where="outer")
    with warning_only() as noted:
        assert parse({**base, "no_such_field": 1}, table) == parse(base, table)
    assert str(noted) == "no_such_field"


@pytest.mark.parametrize(
    ("title", "name"),
    [(title, name) for title, table in TABLES.items() for name in table.nested],
)
def test_fields_inside_a_field_follow_the_same_rule(title, name):
    table = TABLES[title]
    body = {**_base(table), name: {"no_such_field": 1}}
    with pytest.raises(InvalidRequest, match=rf"'{name}\.no_such_field'"):
        parse(body, table)
    with warning_only() as noted:
        assert parse(body, table) == parse({**body, name: {}}, table)
    assert str(noted) == f"{name}.no_such_field"


def test_the_page_has_every_field():
    page = as_markdown()
    for title, name in itertools.chain.from_iterable(
        [(title, name) for name in table.names] for title, table in TABLES.items()
    ):
        section = page.partition(f"### {title}\n")[2].partition("\n### ")[0]
        assert f"`{name}`" in section
