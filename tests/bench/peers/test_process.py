import os
import sys
import textwrap
import venv

import pytest

from sapwood.base.errors import EngineUnavailable
from sapwood.bench.peers.interface import PeerSetup
from sapwood.bench.peers.process import PeerProcess, child_command
from sapwood.bench.workloads.vocabulary import TokenVocabulary
from sapwood.bench.workloads.workload import FixedLengths, WorkloadSpec

SETUP = PeerSetup(model_dir="nowhere", dtype="float32", num_threads=3)
WORKLOAD = WorkloadSpec(
    name="x", title="x", shape=FixedLengths(num_requests=2, prompt_tokens=4, output_tokens=5)
).generate(TokenVocabulary(tuple(range(100, 200))), seed=0)

SCRIPT = """
import json, os, sys, time
start = json.loads(sys.stdin.readline())
assert start["type"] == "Start" and start["setup"]["num_threads"] == 3
assert os.environ["OMP_NUM_THREADS"] == "3"
print(json.dumps({"type": "Ready", "versions": {"fake": "1.0"}}), flush=True)
for line in sys.stdin:
    phases = json.loads(line)["phases"]
    requests = [request for phase in phases for request in phase]
    lengths = [request["num_output_tokens"] for request in requests]
    if len(requests) > 1:
        BEHAVIOUR
    print(json.dumps({
        "type": "Done", "phase_s": [0.5] * len(phases), "num_output_tokens": lengths,
        "num_cached_tokens": [len(request["prompt_ids"]) for request in requests],
        "peak_rss_bytes": 1234,
    }), flush=True)
"""


def start(behaviour="pass", *, timeout_s=20.0, script=SCRIPT):
    code = textwrap.dedent(script).replace("BEHAVIOUR", behaviour)
    return PeerProcess(
        "fake",
        SETUP,
        timeout_s=timeout_s,
        env=dict(os.environ),
        command=[sys.executable, "-c", code],
    )


def test_a_workload_goes_there_and_back():
    with start() as peer:
        result = peer.run(WORKLOAD)
        assert result.phase_s == (0.5,)
        assert result.num_output_tokens == (5, 5)
        assert result.num_cached_tokens == (4, 4)
        facts = peer.facts()
    assert facts.versions == {"fake": "1.0"}
    assert facts.start_s > 0
    assert facts.peak_rss_bytes == 1234


def test_a_peer_that_dies_shows_its_log():
    with (
        start("sys.exit('out of memory')") as peer,
        pytest.raises(EngineUnavailable, match=r"(?s)fake failed: .*ended.*out of memory"),
    ):
        peer.run(WORKLOAD)


def test_a_peer_that_fails_says_why():
    failed = """print(json.dumps({"type": "Failed", "message": "no such op"}), flush=True); break"""
    with start(failed) as peer, pytest.raises(EngineUnavailable, match="no such op"):
        peer.run(WORKLOAD)


def test_a_peer_that_hangs_is_ended():
    with (
        start("time.sleep(60)", timeout_s=1.5) as peer,
        pytest.raises(EngineUnavailable, match=r"no answer within 1\.5 s"),
    ):
        peer.run(WORKLOAD)


def test_a_peer_that_cannot_start_leaves_nothing_behind():
    with pytest.raises(EngineUnavailable, match=r"(?s)its process ended.*cannot load"):
        start(script="import sys; sys.exit('cannot load')")


def test_unknown_peers_are_refused_by_the_real_child():
    with pytest.raises(EngineUnavailable, match="unknown peer 'fake'; known: llama_cpp, openvino"):
        PeerProcess("fake", SETUP, timeout_s=60.0, env=dict(os.environ))


def test_an_interpreter_without_sapwood_runs_the_child(tmp_path):
    venv.create(tmp_path / "bare", symlinks=True)
    command = child_command(str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(EngineUnavailable, match="unknown peer 'fake'; known: llama_cpp, openvino"):
        PeerProcess("fake", SETUP, timeout_s=60.0, env=dict(os.environ), command=command)
