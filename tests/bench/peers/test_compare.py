from dataclasses import dataclass, field
from io import StringIO

import pytest
from rich.console import Console

from sapwood.base.errors import ConfigError
from sapwood.bench.offline import RunResult
from sapwood.bench.peers.compare import PeerFacts, PeersOptions, compare, rotated
from sapwood.bench.report import comparison_table
from sapwood.bench.workloads.vocabulary import TokenVocabulary
from sapwood.bench.workloads.workload import WALL_TIME, FixedLengths, WorkloadSpec

TOKENS = TokenVocabulary(tuple(range(100, 200)))
RATE = WorkloadSpec(
    name="rate",
    title="rate",
    shape=FixedLengths(num_requests=2, prompt_tokens=4, output_tokens=5),
)
WALL = WorkloadSpec(name="wall", title="wall", shape=RATE.shape, headline=WALL_TIME)


@dataclass
class TimedPeer:
    """Takes the next of the given seconds for each run; the first is the warm-up."""

    name: str
    seconds: list[float]
    log: list[str]
    prompts: list = field(default_factory=list)

    def run(self, workload):
        self.log.append(self.name)
        self.prompts.append([request.prompt for request in workload.requests])
        return RunResult(
            phase_s=(self.seconds.pop(0),), num_output_tokens=(5, 5), num_cached_tokens=(0, 0)
        )

    def facts(self):
        return PeerFacts(versions={}, start_s=0.0, peak_rss_bytes=0)


def compared(spec):
    log: list[str] = []
    # The machine slows down threefold in the second repeat, for both alike.
    fast = TimedPeer("fast", [9.0, 1.0, 3.0, 1.0], log)
    slow = TimedPeer("slow", [9.0, 2.0, 6.0, 4.0], log)
    comparison = compare([fast, slow], [spec], TOKENS, baseline="slow", repeats=3, seed=0)
    return comparison, fast, slow, log


@pytest.mark.parametrize("spec", [RATE, WALL])
def test_ratios_are_paired_within_a_repeat(spec):
    comparison, *_ = compared(spec)
    ratio = comparison.ratios()["fast"][spec.name]
    assert ratio.median == pytest.approx(2.0)
    assert (ratio.minimum, ratio.maximum) == (pytest.approx(2.0), pytest.approx(4.0))
    assert comparison.ratios()["slow"][spec.name].maximum == 1.0


def test_peers_take_turns_on_the_same_prompts():
    _, fast, slow, log = compared(RATE)
    assert log == ["fast", "slow", "fast", "slow", "slow", "fast", "fast", "slow"]
    assert fast.prompts == slow.prompts
    flat = [prompt for prompts in fast.prompts for prompt in prompts]
    assert len(set(flat)) == len(flat) == 8


def test_the_table_of_many_peers_is_not_cut():
    peers = [TimedPeer(f"peer-{index}", [9.0, 1.0 + index], []) for index in range(20)]
    comparison = compare(peers, [WALL], TOKENS, baseline="peer-0", repeats=1, seed=0)
    console = Console(file=StringIO(), width=80)
    console.print(comparison_table(comparison))
    text = console.file.getvalue()
    for index in range(20):
        assert f"peer-{index} " in text
        assert f"{1.0 + index:.2f} s" in text or f"{1.0 + index:.1f} s" in text
    assert "0.500 x" in text
    assert "…" not in text


def test_every_repeat_is_told():
    told = []
    log: list[str] = []
    peers = [TimedPeer("x", [1.0] * 3, log), TimedPeer("y", [1.0] * 3, log)]
    compare(
        peers,
        [RATE],
        TOKENS,
        baseline="x",
        repeats=2,
        seed=0,
        on_repeat=lambda workload, peer, repeat: told.append((workload, peer, repeat.wall_s)),
    )
    assert told == [(("rate"), name, 1.0) for name in ("x", "y", "y", "x")]


def test_turns_go_round():
    peers = [TimedPeer(name, [], []) for name in "abc"]
    assert [peer.name for peer in rotated(peers, 4)] == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peers": ""}, "name each peer once"),
        ({"peers": "sapwood,sapwood"}, "name each peer once"),
        ({"peers": "sapwood"}, "--baseline transformers is not compared"),
        ({"repeats": 0}, "--repeats"),
        ({"num_threads": 0}, "--num-threads"),
        ({"peer_timeout": 0.0}, "--peer-timeout"),
        ({"workload": "z"}, "unknown workload 'z'"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PeersOptions(**options)
