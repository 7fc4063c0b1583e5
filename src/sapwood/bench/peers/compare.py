"""Compares peers on the same prompts, one run each in turn, as ratios to a baseline.

Absolute figures of a shared machine drift within minutes. Each repeat therefore runs every peer
right after the other, in an order that rotates, and is compared within itself: the ratio quoted is
the median of the repeats' ratios, not the ratio of medians.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sapwood.base.dtypes import DTYPE_BYTES
from sapwood.base.errors import ConfigError
from sapwood.bench.distribution import Spread
from sapwood.bench.offline import OfflineResult, Repeat, RunResult, measure_repeat
from sapwood.bench.workloads.presets import WorkloadOptions
from sapwood.bench.workloads.vocabulary import Vocabulary
from sapwood.bench.workloads.workload import Workload, WorkloadSpec
from sapwood.schema.config.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersOptions:
    """The compared peers and their workloads."""

    model: str = option(
        "smollm2-135m",
        "Catalogue name, hub repository id (owner/name), or path of a model. A GGUF file is "
        "converted to safetensors once, and every peer loads the conversion.",
        aliases=["model-path"],
    )
    peers: str = option(
        "sapwood,transformers", "Comma-separated peers; plugins may add some. See the docs."
    )
    peers_file: str | None = option(
        None,
        "YAML file that describes further peers by name: kind, python, model, options.",
    )
    baseline: str = option("transformers", "The peer that the others are shown as multiples of.")
    workload: str = option("a,b,c,d", "Comma-separated workloads, as for `bench offline`.")
    repeats: int = option(3, "Timed runs of each peer on each workload.", unit="runs")
    seed: int = option(0, "Seed of the prompts.")
    dtype: str = option(
        "bfloat16",
        "Data type of every peer's weights, activations and KV cache.",
        choices=tuple(DTYPE_BYTES),
    )
    num_threads: int = option(2, "Threads of every peer.", unit="threads")
    peer_timeout: float = option(
        1800.0, "A peer without an answer after this long has failed.", unit="seconds"
    )
    offline: bool = option(False, "Use only what is cached; never ask a source for the model.")

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ConfigError(f"--repeats is {self.repeats} but must be >= 1")
        if self.num_threads < 1:
            raise ConfigError(f"--num-threads is {self.num_threads} but must be >= 1")
        if self.peer_timeout <= 0:
            raise ConfigError(f"--peer-timeout is {self.peer_timeout} but must be > 0")
        names = self.peer_names
        if len(set(names)) != len(names) or not names:
            raise ConfigError(f"--peers is {self.peers!r} but must name each peer once")
        if self.baseline not in names:
            raise ConfigError(
                f"--baseline {self.baseline} is not compared; name one of: {', '.join(names)}"
            )
        self.specs()

    @property
    def peer_names(self) -> list[str]:
        return [name.strip() for name in self.peers.split(",") if name.strip()]

    def specs(self) -> list[WorkloadSpec]:
        return WorkloadOptions(workload=self.workload, seed=self.seed).specs()


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFacts:
    """Facts about a peer's process.

    start_s         seconds from the start of the process to its first answer
    peak_rss_bytes  peak of its resident memory
    """

    versions: Mapping[str, str]
    start_s: float
    peak_rss_bytes: int


class Peer(Protocol):
    """A peer with its model loaded, such as a `PeerProcess`."""

    @property
    def name(self) -> str: ...

    def run(self, workload: Workload) -> RunResult: ...

    def facts(self) -> PeerFacts: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The results of a comparison.

    results  workload -> peer -> its repeats; repeats of one index ran right after each other
    """

    baseline: str
    results: Mapping[str, Mapping[str, OfflineResult]]

    def ratios(self) -> dict[str, dict[str, Spread]]:
        """Peer -> workload -> its speed divided by the baseline's; above 1 is faster."""
        peers = list(dict.fromkeys(peer for of_peer in self.results.values() for peer in of_peer))
        ratios: dict[str, dict[str, Spread]] = {peer: {} for peer in peers}
        for workload, of_peer in self.results.items():
            for peer, result in of_peer.items():
                values = paired_ratios(result, of_peer[self.baseline])
                if values:
                    ratios[peer][workload] = Spread.of(values)
        return ratios

    def to_json(self) -> dict[str, Any]:
        return {
            "baseline": self.baseline,
            "ratios": self.ratios(),
            "results": {
                workload: {peer: result.to_json() for peer, result in of_peer.items()}
                for workload, of_peer in self.results.items()
            },
        }


def paired_ratios(result: OfflineResult, baseline: OfflineResult) -> list[float]:
    """Speed divided by the baseline's, for each repeat in which both have a figure."""
    headline = result.spec.headline
    ratios = []
    for own, other in zip(result.repeats, baseline.repeats, strict=True):
        value, reference = own.figure(headline.metric), other.figure(headline.metric)
        if value and reference:
            ratios.append(value / reference if headline.higher_is_better else reference / value)
    return ratios


def compare(
    peers: Sequence[Peer],
    specs: Sequence[WorkloadSpec],
    vocabulary: Vocabulary,
    *,
    baseline: str,
    repeats: int,
    seed: int,
    on_repeat: Callable[[str, str, Repeat], None] = lambda *_: None,
) -> Comparison:
    """Warm up, then run every peer on every workload.

    on_repeat  called with (workload, peer, figures) after each run
    """
    results = {}
    for spec in specs:
        warm_up = spec.generate(vocabulary, seed=seed, repeat="warm-up")
        for peer in peers:
            peer.run(warm_up)
        done: dict[str, list[Repeat]] = {peer.name: [] for peer in peers}
        for index in range(repeats):
            for peer in rotated(peers, index):
                repeat = measure_repeat(peer.run, spec, vocabulary, seed=seed, repeat=index)
                on_repeat(spec.name, peer.name, repeat)
                done[peer.name].append(repeat)
        summary = spec.generate(vocabulary, seed=seed, repeat=0).summary()
        results[spec.name] = {
            name: OfflineResult(workload=summary, spec=spec, repeats=tuple(of_peer))
            for name, of_peer in done.items()
        }
    return Comparison(baseline=baseline, results=results)


def rotated(peers: Sequence[Peer], turns: int) -> list[Peer]:
    """The peers, with another one first in each turn: the first may find a cooler machine."""
    first = turns % len(peers)
    return [*peers[first:], *peers[:first]]
