import io
from contextlib import contextmanager

import psutil
import pytest

from sapwood.base.clock import ManualClock
from sapwood.bench.offline import Generated
from sapwood.bench.peers import child
from sapwood.bench.peers.interface import PeerSetup
from sapwood.bench.peers.messages import (
    Done,
    Failed,
    PeerRequest,
    Ready,
    Run,
    Start,
    decode_from_peer,
    encode,
)

SETUP = PeerSetup(model_dir="nowhere", dtype="float32", num_threads=1)
RUN = Run(
    phases=[
        [PeerRequest(prompt_ids=[1, 2], num_output_tokens=3)],
        [PeerRequest(prompt_ids=[3], num_output_tokens=1)] * 2,
    ]
)


@pytest.fixture
def peer(monkeypatch):
    """Registers a peer that takes a second for each output token."""
    clock = ManualClock()
    closed = []

    class Slow:
        def generate(self, prompts, output_lengths):
            if prompts[0] == [9]:
                raise ValueError("prompt 9")
            clock.advance(float(sum(output_lengths)))
            return [Generated(num_output_tokens=length) for length in output_lengths]

    @contextmanager
    def open_slow(setup):
        assert setup == SETUP
        try:
            yield Slow()
        finally:
            closed.append(True)

    class Registered:
        def get(self, name):
            assert name == "slow"
            return open_slow

    monkeypatch.setattr(child, "PEERS", Registered())
    return clock, closed


def serve(clock, *messages):
    answers = io.BytesIO()
    status = child.serve([encode(message) for message in messages], answers, clock)
    return status, [decode_from_peer(line) for line in answers.getvalue().splitlines()]


def test_a_run_is_timed_phase_by_phase(peer):
    clock, closed = peer
    status, (ready, done) = serve(clock, Start(peer="slow", setup=SETUP), RUN)
    assert status == 0
    assert isinstance(ready, Ready)
    assert "sapwood" in ready.versions
    assert isinstance(done, Done)
    assert done.phase_s == [3.0, 2.0]
    assert done.num_output_tokens == [3, 1, 1]
    assert done.peak_rss_bytes > 2**20
    assert closed == [True]


def test_a_failure_is_told_and_ends_the_process(peer, capsys):
    clock, closed = peer
    bad = Run(phases=[[PeerRequest(prompt_ids=[9], num_output_tokens=1)]])
    status, (_, failed) = serve(clock, Start(peer="slow", setup=SETUP), bad, RUN)
    assert status == 1
    assert failed == Failed(message="ValueError: prompt 9")
    assert closed == [True]
    assert "prompt 9" in capsys.readouterr().err


def test_the_first_message_must_start(peer, capsys):
    status, (failed,) = serve(peer[0], RUN)
    assert status == 1
    assert "must be Start" in failed.message
    assert "must be Start" in capsys.readouterr().err


def test_the_peak_covers_this_process():
    process = psutil.Process()
    assert child.peak_rss_bytes(process) >= process.memory_info().rss // 2
