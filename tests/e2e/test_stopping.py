"""However early a server is told to stop, it stops in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.tiny import write_llama

LIMIT_S = 120.0


class Starting:
    """A server on its way up: its process, its log, and the folder for temporary files."""

    def __init__(self, directory: Path) -> None:
        model = write_llama(directory / "m")
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        self._log = directory / "log"
        command = [sys.executable, "-m", "sapwood", "serve", "--port", "0"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--model", str(model), "--load-format", "dummy"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(self.temporary), "PYTHONUNBUFFERED": "1"},
            )

    @property
    def log(self) -> str:
        return self._log.read_text("utf-8", "replace")

    @property
    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    @property
    def sockets(self) -> list[Path]:
        return list(self.temporary.glob("sapwood-*"))

    def takes_sigterm(self) -> bool:
        """Whether the process has a handler of its own for it, as Linux tells."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


STAGES: dict[str, Callable[[Starting], bool]] = {
    "it takes SIGTERM": lambda server: server.takes_sigterm(),
    "the engine's process has begun": lambda server: bool(server.children),
    "its folder for sockets is there": lambda server: bool(server.sockets),
    "both sockets are bound": lambda server: any(
        len(list(folder.rglob("*"))) >= 2 for folder in server.sockets
    ),
    "it is ready": lambda server: "ready after" in server.log,
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the stages are read in /proc")
@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_at_any_stage_of_the_start_ends_with_0_and_leaves_nothing(
    tmp_path: Path, stage: str
) -> None:
    server = Starting(tmp_path)
    end = time.monotonic() + LIMIT_S
    try:
        while not STAGES[stage](server):
            assert server.process.poll() is None, server.log
            assert time.monotonic() < end, server.log
            time.sleep(0.005)
        children = server.children
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0, server.log
    finally:
        server.process.kill()
        server.process.wait()
    assert "Traceback" not in server.log
    assert server.sockets == []
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []
