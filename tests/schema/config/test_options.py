from dataclasses import dataclass

import pytest

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import (
    Given,
    build,
    check_options,
    gather,
    gather_given,
    option,
    option_specs,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    height: float = option(1.5, "How tall.", unit="metres")
    rings: int | None = option(None, "How old.", unit="years")
    kind: str = option("oak", "Which.", choices=("oak", "elm"), aliases=["tree-kind"])
    is_alive: bool = option(True, "Whether it stands.")
    label: str | None = option(None, "What the sign says.")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pond:
    depth: int = option(2, "How deep.", aliases=["pond-depth"])


SPECS = {spec.name: spec for spec in option_specs(Tree)}


def ask(flags=None, env=None, file=None):
    return gather([Tree], flags=flags or {}, env=env or {}, file=file or {})


def test_a_spec_says_what_the_field_says():
    rings = SPECS["rings"]
    assert (rings.type, rings.optional, rings.default, rings.unit) == (int, True, None, "years")
    assert (rings.flag, rings.env) == ("--rings", "SAPWOOD_RINGS")
    assert SPECS["is_alive"].flag == "--is-alive"
    assert SPECS["kind"].choices == ("oak", "elm")
    assert SPECS["kind"].aliases == ("tree-kind",)


def test_specs_come_in_the_order_of_the_fields():
    assert list(SPECS) == ["height", "rings", "kind", "is_alive", "label"]


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("rings", "12", 12),
        ("rings", -3, -3),
        ("rings", None, None),
        ("height", "2.5", 2.5),
        ("height", 3, 3.0),
        ("height", "inf", float("inf")),
        ("kind", "elm", "elm"),
        ("is_alive", "off", False),
        ("is_alive", "Yes", True),
        ("is_alive", "1", True),
        ("is_alive", False, False),
        ("label", "1.10", "1.10"),
    ],
)
def test_a_value_is_read_as_its_type(name, given, value):
    parsed = SPECS[name].parse(given, source="here")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("rings", "twelve", "a whole number"),
        ("rings", 3.7, "a whole number"),
        ("rings", True, "a whole number"),
        ("rings", [1], "a whole number"),
        ("height", "tall", "a number"),
        ("height", "nan", "a number"),
        ("height", None, "a number"),
        ("kind", "birch", "one of: oak, elm"),
        ("kind", None, "text"),
        ("is_alive", "maybe", "true or false"),
        ("label", 1.1, "quote it"),
        ("label", ["a"], "text"),
    ],
)
def test_a_value_of_another_type_is_refused(name, given, words):
    with pytest.raises(ConfigError) as refused:
        SPECS[name].parse(given, source="the garden")
    assert words in refused.value.message
    assert name in refused.value.message
    assert "the garden" in refused.value.message


@pytest.mark.parametrize(
    "values",
    [{"kind": "birch"}, {"rings": "12"}, {"rings": True}, {"height": float("nan")}, {"label": 3}],
)
def test_a_struct_built_in_python_is_checked_too(values):
    with pytest.raises(ConfigError, match=f"--{next(iter(values))} is "):
        Tree(**values)


def test_a_whole_number_is_a_number():
    assert Tree(height=2).height == 2


def test_the_command_line_wins_over_the_environment_and_that_over_the_file():
    everywhere = {
        "flags": {"rings": 1},
        "env": {"SAPWOOD_RINGS": "2", "SAPWOOD_HEIGHT": "2"},
        "file": {"rings": 3, "height": 3, "kind": "elm"},
    }
    assert ask(**everywhere) == {"rings": 1, "height": 2.0, "kind": "elm"}


def test_each_value_knows_where_it_comes_from():
    given = gather_given(
        [Tree],
        flags={"rings": 1},
        env={"SAPWOOD_HEIGHT": "2"},
        file={"kind": "elm"},
        file_name="tree.yaml",
    )
    assert given == {
        "rings": Given(1, "the command line"),
        "height": Given(2.0, "the environment (SAPWOOD_HEIGHT)"),
        "kind": Given("elm", "tree.yaml"),
    }


def test_what_nobody_gave_is_left_to_the_default():
    assert ask() == {}
    assert build(Tree, {}) == Tree()


def test_an_empty_environment_variable_counts_as_not_set():
    assert ask(env={"SAPWOOD_RINGS": "", "SAPWOOD_LABEL": ""}) == {}


def test_the_environment_is_parsed_and_named_in_errors():
    with pytest.raises(ConfigError, match=r"SAPWOOD_RINGS.*a whole number"):
        ask(env={"SAPWOOD_RINGS": "many"})


@pytest.mark.parametrize("key", ["is_alive", "is-alive"])
def test_a_file_may_use_dashes_or_underscores(key):
    assert ask(file={key: False}) == {"is_alive": False}


@pytest.mark.parametrize("key", ["tree-kind", "tree_kind"])
def test_a_file_may_use_an_alias(key):
    assert ask(file={key: "elm"}) == {"kind": "elm"}


def test_a_file_that_gives_an_option_by_two_names_is_refused():
    with pytest.raises(ConfigError, match="kind twice"):
        ask(file={"kind": "elm", "tree-kind": "oak"})


def test_an_unknown_key_is_refused_with_the_nearest_names():
    with pytest.raises(ConfigError, match=r"'heigth'; did you mean height\?"):
        ask(file={"heigth": 3})


def test_keys_of_other_commands_are_passed_over():
    given = gather_given(
        [Tree], flags={}, env={}, file={"pond-depth": 3, "rings": 1}, known_elsewhere=[Pond]
    )
    assert list(given) == ["rings"]


def test_build_takes_only_what_is_its_own():
    values = gather([Tree, Pond], flags={}, env={}, file={"depth": 9, "rings": 4})
    assert build(Pond, values) == Pond(depth=9)
    assert build(Tree, values) == Tree(rings=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Boat:
    kind: str | None = option(None, "Another which.", aliases=["tree-kind"], scope="boat")


def test_a_scope_stands_before_the_name_wherever_commands_share_names():
    (spec,) = option_specs(Boat)
    assert (spec.flag, spec.env) == ("--kind", "SAPWOOD_BOAT_KIND")

    def asked(env, file):
        return gather([Boat], flags={}, env=env, file=file)

    assert asked({"SAPWOOD_KIND": "oak"}, {"boat-kind": "punt"}) == {"kind": "punt"}
    assert asked({"SAPWOOD_BOAT_KIND": "raft"}, {"boat_tree_kind": "punt"}) == {"kind": "raft"}
    trees = gather_given(
        [Boat], flags={}, env={}, file={"kind": "oak"}, file_name="f", known_elsewhere=[Tree]
    )
    assert trees == {}
    with pytest.raises(ConfigError, match="unknown key 'kind'"):
        asked({}, {"kind": "oak"})
