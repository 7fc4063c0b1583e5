"""A master of Mooncake's store for the tests, with memory of the tests' own process."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

LIMIT_S = 30.0


@contextmanager
def mooncake_master(folder: Path) -> Iterator[str]:
    """Its address. Skips where the package is not installed."""
    found = importlib.util.find_spec("mooncake")
    if found is None or found.origin is None:
        pytest.skip("mooncake-transfer-engine is not installed")
    port, metrics = _free_port(), _free_port()
    command = [str(Path(found.origin).parent / "mooncake_master"), f"-rpc_port={port}"]
    command += [f"-metrics_port={metrics}", "-rpc_address=127.0.0.1"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        end = time.monotonic() + LIMIT_S
        while not _answers(port):
            assert process.poll() is None, (folder / "log").read_text("utf-8", "replace")
            assert time.monotonic() < end, "the master does not answer"
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(LIMIT_S)


def _answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
