"""However early a server is told to stop, it stops in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.tiny import write_llama


@pytest.mark.parametrize("after_s", [0.2, 0.5, 0.8, 1.2, 1.8, 2.5])
def test_sigterm_at_any_time_of_the_start_ends_with_0_and_leaves_nothing(
    tmp_path: Path, after_s: float
) -> None:
    model, temporary = write_llama(tmp_path / "m"), tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "sapwood", "serve", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--model", str(model), "--load-format", "dummy"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    time.sleep(after_s)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert b"Traceback" not in output
    assert list(temporary.glob("sapwood-*")) == []
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []
