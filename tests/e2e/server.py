"""A real server of `sapwood serve` for the tests, on 127.0.0.1 and a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

START_LIMIT_S = 120.0


@dataclass
class Server:
    """A running server: its process, address and log."""

    process: subprocess.Popen[bytes]
    url: str
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text("utf-8", "replace")

    def engine_pid(self) -> int:
        children = psutil.Process(self.process.pid).children()
        (engine,) = [
            one for one in children if "sapwood.app.building.engine_process" in one.cmdline()
        ]
        return engine.pid

    def counters(self) -> dict[str, int]:
        """The engines' counters and gauges, by name; of several engines their sums."""
        answer = httpx.get(f"{self.url}/server_info", timeout=30).raise_for_status().json()
        first, *others = answer["internal_states"]
        return {
            name: value + sum(one[name] for one in others) if isinstance(value, int) else value
            for name, value in first.items()
        }

    def wait_until_idle(self, limit_s: float = 30.0) -> dict[str, int]:
        end = time.monotonic() + limit_s
        while True:
            counters = self.counters()
            if counters["num_running"] == 0 and counters["num_waiting"] == 0:
                return counters
            assert time.monotonic() < end, f"still busy: {counters}"
            time.sleep(0.05)

    def resident_bytes(self) -> int:
        """Memory of both processes."""
        parent = psutil.Process(self.process.pid)
        return sum(one.memory_info().rss for one in [parent, *parent.children(recursive=True)])


@contextmanager
def serving(*flags: str, start_limit_s: float = START_LIMIT_S) -> Iterator[Server]:
    """Start a server with these flags, wait until it is ready, end it afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        log_path = Path(directory) / "log"
        own = ["--port", "0", "--state-dir", str(Path(directory) / "state")]
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "sapwood", "serve", *own, *flags],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        try:
            server = Server(process, _wait_for_url(process, log_path, start_limit_s), log_path)
            yield server
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _wait_for_url(process: subprocess.Popen[bytes], log_path: Path, limit_s: float) -> str:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        log = log_path.read_text("utf-8", "replace")
        found = re.search(r"ready after .* at ((?:http|grpc)s?://\S+)", log)
        if found:
            return found.group(1)
        assert process.poll() is None, f"the server ended before it was ready:\n{log}"
        time.sleep(0.05)
    raise AssertionError(f"not ready after {limit_s} s:\n{log_path.read_text()}")
