"""Policies that a package beside sapwood adds by entry points."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from sapwood.base.errors import ConfigError
from sapwood.base.registry import plugins_of
from sapwood.engine.policy import SCHEDULE_POLICIES, Waiting
from sapwood.gateway.policies.interface import Call
from sapwood.gateway.policies.registry import make_policy
from sapwood.schema.config.gateway import GatewayConfig
from sapwood.schema.config.scheduler import SchedulerConfig

MODULE = """
from sapwood.engine.policy import Policy

SHORTEST = Policy(lambda waiting, rng: sorted(waiting, key=lambda one: one.max_new_tokens))


class Last:
    needs_text = False
    prefixes = None

    def choose(self, candidates, call):
        return candidates[-1]

    def forget(self, worker_id):
        pass


def last(config, rng, known):
    return Last()
"""
POINTS = """[sapwood.schedule_policies]
shortest = plugged_policies:SHORTEST
[sapwood.gateway_policies]
last = plugged_policies:last
"""


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "plugged_policies.py").write_text(MODULE)
    facts = tmp_path / "plugged_policies-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.4\nName: plugged_policies\nVersion: 1\n")
    (facts / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    plugins_of.cache_clear()
    yield
    plugins_of.cache_clear()


@pytest.mark.usefixtures("plugged")
def test_policies_of_a_package_are_choices_like_our_own() -> None:
    assert SchedulerConfig(schedule_policy="shortest").schedule_policy == "shortest"
    waiting = [
        Waiting(index=i, priority=0, arrival=i, max_new_tokens=n) for i, n in enumerate((9, 3, 5))
    ]
    order = SCHEDULE_POLICIES.get("shortest").order(waiting, random.Random(0))
    assert [one.index for one in order] == [1, 2, 0]
    config = GatewayConfig(worker_urls="http://127.0.0.1:1", policy="last")
    policy = make_policy(config, random.Random(0))
    assert policy.choose(["a", "b"], Call()) == "b"  # type: ignore[type-var]


@pytest.mark.usefixtures("plugged")
def test_an_unknown_policy_is_told_the_names_of_packages_too() -> None:
    with pytest.raises(ConfigError, match=r"fcfs.*routing-key, shortest"):
        SchedulerConfig(schedule_policy="longest")
