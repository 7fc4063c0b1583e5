"""A short soak, so that the long one can be trusted to look."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from sapwood.bench.cli import bench
from sapwood.bench.soak import Soak, SoakOptions
from tests.e2e.server import serving
from tests.tiny import write_llama

SHORT = (
    "--duration",
    "6",
    "--settle-time",
    "3",
    "--concurrency",
    "16",
    "--max-output-tokens",
    "24",
)
# A few seconds are too short for memory to settle.
LENIENT = ("--max-memory-growth", "0.5", "--max-prompt-words", "40")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "m", max_position_embeddings=1024)


def test_a_short_soak_finds_nothing(model: Path) -> None:
    flags = ("--max-total-tokens", "8192", "--enable-priority-scheduling")
    few = ("--max-running-requests", "8", "--priority-scheduling-preemption-threshold", "1")
    with serving("--model", str(model), "--load-format", "dummy", *flags, *few) as server:
        log = ("--log-file", str(server.log_path))
        result = CliRunner(env={"COLUMNS": "200"}).invoke(
            bench, ["soak", "--url", server.url, *log, *SHORT, *LENIENT]
        )
        assert result.exit_code == 0, result.output
        assert "nothing leaked" in result.output
        counters = server.counters()
        assert counters["num_preemptions"] > 0
        assert counters["num_aborted"] > 0
        assert counters["num_arrived"] == sum(
            counters[f"num_{how}"] for how in ("finished", "aborted", "refused", "timed_out")
        )


def test_what_breaks_is_found(model: Path) -> None:
    with serving("--model", str(model), "--load-format", "dummy", "--restart-engine") as server:
        options = SoakOptions(
            url=server.url, duration=4, settle_time=1, concurrency=4, max_prompt_words=20
        )
        soak = Soak(options)

        def kill_amid_requests() -> None:
            engine_pid = server.engine_pid()
            end = time.monotonic() + options.duration
            while server.counters()["num_running"] == 0 and time.monotonic() < end:
                time.sleep(0.01)
            os.kill(engine_pid, signal.SIGSTOP)  # what runs cannot end before it is killed
            time.sleep(0.3)
            os.kill(engine_pid, signal.SIGKILL)

        killer = threading.Timer(1.5, kill_amid_requests)
        killer.start()
        report = asyncio.run(soak.run())
        killer.join()
    assert any("SIGKILL" in problem for problem in report.problems)
    assert any("process of the server has ended" in problem for problem in report.problems)
