"""Hostile requests through the gateway: it answers all, with no 5xx of its own, and never hangs."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.malformed import cases
from tests.e2e.server import Server, serving
from tests.e2e.test_malformed import FLAGS, complaint, run_cases
from tests.tiny import write_llama

pytestmark = pytest.mark.long

NUM_CASES = 200
START_LIMIT_S = 60.0


@contextmanager
def gateway(engine: Server, directory: Path, *flags: str) -> Iterator[Server]:
    """A `sapwood gateway` before that engine, which is ready."""
    log_path = directory / "gateway.log"
    own = ["--port", "0", "--prometheus-port", "-1", "--state-dir", str(directory / "state")]
    command = [sys.executable, "-m", "sapwood", "gateway", engine.url, *own, *flags]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + START_LIMIT_S
        while True:
            assert process.poll() is None, log_path.read_text()
            assert time.monotonic() < end, log_path.read_text()
            found = re.search(r"the gateway is at (http://\S+);", log_path.read_text())
            if found and httpx.get(f"{found[1]}/readiness").status_code == 200:
                break
            time.sleep(0.05)
        yield Server(process, found[1], log_path)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = write_llama(tmp_path_factory.mktemp("models") / "m", max_position_embeddings=2048)
    with serving("--model", str(model), "--load-format", "dummy") as server:
        yield server


def test_200_malformed_requests(engine: Server, tmp_path: Path) -> None:
    with gateway(engine, tmp_path, *FLAGS) as server:
        made = cases(NUM_CASES, seed=3)
        answers = run_cases(server, made)
        complaints = [
            f"{case.kind}: {what}: {case.raw[:300]!r} -> {answer[:300]!r}"
            for case, answer in zip(made, answers, strict=True)
            if (what := complaint(case, answer)) is not None
        ]
        assert complaints == []
        assert "Traceback" not in server.log
        engine.wait_until_idle()
        (worker,) = httpx.get(f"{server.url}/workers").json()["workers"]
        assert (worker["load"], worker["circuit_breaker"]) == (0, "closed")
