"""How a server starts, drains and dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.e2e.server import Server, serving

LONG = {"prompt": "Tell me", "max_tokens": 4000, "ignore_eos": True, "stream": True}
STEP_S = 0.02
"""Of a slowed server: it would take 80 seconds for LONG."""


class Reader(threading.Thread):
    """Reads one stream to its end."""

    def __init__(self, url: str, body: dict[str, object]) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.body = body
        self.events: list[dict[str, object]] = []
        self.has_begun = threading.Event()

    def run(self) -> None:
        with httpx.stream("POST", f"{self.url}/v1/completions", json=self.body, timeout=60) as got:
            for line in got.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    self.events.append(json.loads(line[6:]))
                    self.has_begun.set()


def flags(model: Path, *more: str) -> list[str]:
    pool = ["--max-total-tokens", "32768"]
    return ["--model", str(model), "--load-format", "dummy", *pool, *more]


def slow_down(server: Server) -> None:
    body = {"forward_sleep_time": STEP_S}
    httpx.post(f"{server.url}/slow_down", json=body).raise_for_status()


def start_readers(server: Server, count: int, body: dict[str, object]) -> list[Reader]:
    readers = [Reader(server.url, body) for _ in range(count)]
    for reader in readers:
        reader.start()
    for reader in readers:
        assert reader.has_begun.wait(30)
    return readers


def test_a_dead_engine_ends_every_stream_and_the_server(long_model: Path) -> None:
    with serving(*flags(long_model)) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        slow_down(server)
        readers = start_readers(server, 4, LONG)
        os.kill(server.engine_pid(), signal.SIGKILL)
        for reader in readers:
            reader.join(10)
            assert not reader.is_alive()
            assert "SIGKILL" in json.dumps(reader.events[-1])
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503
        assert "SIGKILL" in health.text
        assert server.process.wait(30) == 1
        assert "SIGKILL" in server.log.strip().splitlines()[-1]


def test_sigterm_lets_open_requests_end(long_model: Path) -> None:
    with serving(*flags(long_model)) as server:
        slow_down(server)
        (reader,) = start_readers(server, 1, {**LONG, "max_tokens": 100})
        server.process.send_signal(signal.SIGTERM)
        reader.join(30)
        assert server.process.wait(30) == 0
        choices = [event["choices"] for event in reader.events if event.get("choices")]
        assert choices[-1][0]["finish_reason"] == "length"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


def test_the_drain_has_a_limit(long_model: Path) -> None:
    with serving(*flags(long_model, "--drain-timeout", "1")) as server:
        slow_down(server)
        start_readers(server, 1, LONG)
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        # Far less than the 4,000 tokens would take.
        assert time.monotonic() - begin < 20


@pytest.mark.parametrize("num_signals", [1, 2, 3])
def test_every_sigterm_ends_with_0(qwen3: Path, num_signals: int) -> None:
    """However often it is asked, the open request ends as it would have."""
    with serving("--model", str(qwen3)) as server:
        (reader,) = start_readers(server, 1, {**LONG, "max_tokens": 240})
        for _ in range(num_signals):
            server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        reader.join(10)
        choices = [event["choices"] for event in reader.events if event.get("choices")]
        assert choices[-1][0]["finish_reason"] == "length"
        assert "Traceback" not in server.log


def test_a_second_ctrl_c_does_not_wait_for_open_requests(long_model: Path) -> None:
    with serving(*flags(long_model, "--drain-timeout", "600")) as server:
        slow_down(server)
        (reader,) = start_readers(server, 1, LONG)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(1)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0
        reader.join(10)
        assert not reader.is_alive()
        assert "Traceback" not in server.log


def test_what_cannot_start_says_why_and_exits_with_1(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    command = [sys.executable, "-m", "sapwood", "serve", "--port", "0"]
    wrong = subprocess.run(
        [*command, "--model", str(tmp_path), "--load-format", "dummy"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert wrong.returncode == 1
    assert "Traceback" not in wrong.stderr
    missing = subprocess.run(
        [*command, "--model", "no-such-model"], capture_output=True, text=True, timeout=120
    )
    assert missing.returncode == 1
    assert "no-such-model" in missing.stderr
