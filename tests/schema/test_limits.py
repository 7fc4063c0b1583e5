from __future__ import annotations

import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.schema import limits
from sapwood.schema.config.engine import COMPONENTS
from sapwood.schema.config.options import option_specs
from sapwood.schema.config.server import ServerConfig
from sapwood.schema.grammar import choice
from sapwood.schema.limits import LIMITS, Limit, as_markdown
from sapwood.schema.namespace import DIGEST_CHARACTERS, cache_namespace
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams

DEFAULTS = {
    spec.flag: spec.default
    for config in (ServerConfig, *COMPONENTS)
    for spec in option_specs(config)
}


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.name)
def test_one_more_than_the_limit_is_refused_by_its_field(limit: Limit) -> None:
    limit.check(limit.most, "name[0]")
    with pytest.raises(InvalidRequest) as caught:
        limit.check(limit.most + 1, "name[0]", hint="send less")
    assert caught.value.param == "name"
    assert caught.value.message == (
        f"name[0] has {limit.most + 1} {limit.unit} but at most {limit.most} are accepted; "
        "send less"
    )


@pytest.mark.parametrize("limit", [one for one in LIMITS if one.flag], ids=lambda one: one.flag)
def test_a_flags_default_is_its_limit(limit: Limit) -> None:
    assert DEFAULTS[f"--{limit.flag}"] == limit.most


def test_each_limit_stands_in_the_table_once() -> None:
    lines = as_markdown().splitlines()[2:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [
        one.name for one in LIMITS
    ]
    assert len({one.name for one in LIMITS}) == len(LIMITS)


def test_values_with_too_much_cannot_be_made() -> None:
    for make in (
        lambda most: RequestOptions(routing_key="k" * most(limits.ROUTING_KEY)),
        lambda most: SamplingParams(custom_logit_processor="p" * most(limits.CUSTOM_PROCESSOR)),
        lambda most: choice(["a"] * most(limits.CHOICES)),
        lambda most: cache_namespace("k" * most(limits.CACHE_KEY)),
        lambda most: cache_namespace("", "s" * most(limits.CACHE_KEY)),
    ):
        make(lambda limit: limit.most)
        with pytest.raises(InvalidRequest, match="at most"):
            make(lambda limit: limit.most + 1)
    with pytest.raises(ValueError, match="digest"):
        RequestOptions(namespace="k" * (DIGEST_CHARACTERS + 1))


def test_a_namespace_is_a_digest_of_fixed_size() -> None:
    """Review 2, number 1: a name of 60 MB stayed in the prefix tree."""
    assert cache_namespace("") == ""
    for key in ("a", "k" * limits.CACHE_KEY.most, "\ud800"):
        assert len(cache_namespace(key)) == DIGEST_CHARACTERS


def test_no_extra_key_imitates_a_cache_salt() -> None:
    """Review 2, number 8."""
    pairs = [("3:abc", ""), ("", "abc"), ("c", "ab"), ("bc", "a"), ("abc", ""), ("1:abc", "")]
    assert len({cache_namespace(key, salt) for key, salt in pairs}) == len(pairs)
