from __future__ import annotations

from collections import namedtuple
from dataclasses import replace

import psutil
import pytest

from sapwood.app.building.default_model import with_named_model
from sapwood.base.errors import ModelSourceError
from sapwood.schema.config.engine import EngineConfig
from sapwood.store import default_model
from sapwood.store.default_model import PREFERRED, SMALL, choose_default
from sapwood.store.fetch import Fetched
from sapwood.store.progress import Silent

Usage = namedtuple("Usage", "free")


class Store:
    """A store that has the preferred model, or can fetch it, or neither."""

    def __init__(self, home, *, is_cached=False, can_fetch=True):
        self.home, self.is_cached, self.can_fetch = home, is_cached, can_fetch
        self.fetches = 0

    def locate(self, name, *, offline, progress):
        assert name == PREFERRED
        if self.is_cached:
            return Fetched(path=self.home)
        if offline or not self.can_fetch:
            raise ModelSourceError("no source could provide it")
        self.fetches += 1
        self.is_cached = True
        return Fetched(path=self.home)


@pytest.fixture
def machine(monkeypatch):
    """Sets what the machine has free, in bytes."""

    def has(memory, disk):
        available = namedtuple("Memory", "available")(memory)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
        monkeypatch.setattr(default_model.shutil, "disk_usage", lambda path: Usage(disk))

    return has


def choose(store, *, offline=False):
    return choose_default(store, offline=offline, progress=Silent())


def test_the_preferred_model_is_fetched_where_it_fits(tmp_path, machine):
    machine(8 << 30, 8 << 30)
    store = Store(tmp_path / "not there yet")
    assert choose(store).name == PREFERRED
    assert store.fetches == 1
    assert choose(store, offline=True).name == PREFERRED


@pytest.mark.parametrize(
    ("memory", "disk", "store", "why"),
    [
        (1 << 30, 8 << 30, {}, "1.0 GiB of memory are free"),
        (8 << 30, 1 << 30, {}, "1.0 GiB of disk are free"),
        (8 << 30, 8 << 30, {"can_fetch": False}, "no source could provide it"),
    ],
)
def test_else_it_is_the_small_one_and_the_reason_is_said(
    tmp_path, machine, memory, disk, store, why
):
    machine(memory, disk)
    choice = choose(Store(tmp_path, **store))
    assert choice.name == SMALL
    assert why in choice.why


def test_a_cached_model_wants_no_disk(tmp_path, machine):
    machine(8 << 30, 0)
    assert choose(Store(tmp_path, is_cached=True)).name == PREFERRED


def test_a_model_that_is_named_stays(tmp_path):
    asked = EngineConfig()
    named = replace(asked, model=replace(asked.model, model="smollm2-135m"))
    assert with_named_model(named, home=tmp_path) is named


def test_a_folder_called_default_is_a_path_like_any(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "default").mkdir()
    assert with_named_model(EngineConfig(), home=tmp_path).model.model == "default"
