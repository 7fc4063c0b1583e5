"""The services that the commands use, around an engine that answers from a script."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import pytest

from sapwood.frontends.serving.services import Services
from tests.scripted import MakeServices, ScriptedEngine, scripted_services


@pytest.fixture
def make_services() -> MakeServices:
    return scripted_services


class FakeLLM:
    """What the commands use of `sapwood.LLM`, around scripted services; runs on the caller."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.is_closed = False

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, coroutine):  # type: ignore[no-untyped-def]
        return asyncio.run(coroutine)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def make_llm(make_services: MakeServices) -> Callable[..., tuple[FakeLLM, ScriptedEngine]]:
    def make(**script: object) -> tuple[FakeLLM, ScriptedEngine]:
        services, engine = make_services(**script)
        return FakeLLM(services), engine

    return make


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """SAPWOOD_* variables of whoever runs the tests have no say in them."""
    for name in list(os.environ):
        if name.startswith("SAPWOOD_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SAPWOOD_HOME", str(tmp_path / "home"))
