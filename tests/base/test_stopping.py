from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from sapwood.base.stopping import StopSignals

EARLY = """
import signal, time
from sapwood.base.stopping import EarlyExit, StopSignals
EarlyExit().install()
try:
    signal.raise_signal(signal.SIGTERM)
except SystemExit:
    {then}
print("went on")
"""


@pytest.fixture
def stop():
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    signals = StopSignals()
    signals.install()
    yield signals
    for number, handler in before:
        signal.signal(number, handler)


def test_a_signal_that_comes_before_anybody_can_act_is_remembered(stop):
    signal.raise_signal(signal.SIGTERM)
    acted = []
    stop.act_with(acted.append)
    assert acted == [signal.SIGTERM]
    signal.raise_signal(signal.SIGINT)
    assert acted == [signal.SIGTERM, signal.SIGINT]
    stop.ignore()
    signal.raise_signal(signal.SIGTERM)
    assert len(acted) == 2


@pytest.mark.parametrize("then", ["raise", "StopSignals().install()", "time.sleep(20)"])
def test_an_early_exit_cannot_be_swallowed(then):
    done = subprocess.run(
        [sys.executable, "-c", EARLY.format(then=then)], capture_output=True, text=True, timeout=15
    )
    assert (done.returncode, done.stdout) == (0, "")
