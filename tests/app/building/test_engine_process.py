"""The engine's process before it is told what to serve, and how it ends."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sapwood.app.building import engine_process, resolving, wiring
from sapwood.app.building.engine_process import EngineProcessArgs, serve
from sapwood.app.serving.engine_start import start_engine_process
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.output import EngineReady


def test_it_ends_without_a_word_when_its_parent_ends_first() -> None:
    process = start_engine_process()
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(30) == 1


def test_an_engine_that_fails_is_closed_before_the_process_ends(monkeypatch) -> None:
    """With depth 2 the next step still runs then: the interpreter must not end under it."""
    happened = []

    def fail() -> None:
        happened.append("failed")
        raise RuntimeError("a step failed")

    ready = EngineReady(
        context_length=8, max_total_tokens=8, page_size=1, notes=[], options={}, load_s=0.0
    )
    engine = SimpleNamespace(
        run=fail,
        close=lambda: happened.append("closed"),
        prepare_grammars=lambda: None,
        ready=ready,
    )
    monkeypatch.setattr(resolving, "resolve_config", lambda *_, **__: None)
    monkeypatch.setattr(wiring, "build_engine", lambda *_, **__: engine)
    monkeypatch.setattr(engine_process, "ZmqReceiver", lambda *_, **__: None)
    monkeypatch.setattr(engine_process.gc, "freeze", lambda: None)
    watchdog = SimpleNamespace(beat=lambda _: None, rest=lambda: None)
    args = EngineProcessArgs(
        config=EngineConfig(), home="/nowhere", inbox="", outbox="", log_level="info"
    )
    with pytest.raises(RuntimeError, match="a step failed"):
        serve(args, SimpleNamespace(send=lambda _: None), watchdog, None)
    assert happened == ["failed", "closed"]
