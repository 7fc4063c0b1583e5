"""Starts the engine's process, which imports torch while the server's own imports go on."""

from __future__ import annotations

from subprocess import Popen

from sapwood.base.process import start_module


def start_engine_process() -> Popen[bytes]:
    """Start the process. It waits for `EngineProcessArgs`, and ends when this process does."""
    return start_module("sapwood.app.engine_process")
