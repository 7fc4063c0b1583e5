"""The ranks of an engine: rank 0's view of them, and whole engines of two ranks."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sapwood import LLM
from sapwood.app.ranks import ranks
from sapwood.app.ranks.ranks import RankLost, RankTeam
from sapwood.base.errors import ConfigError, EngineUnavailable, StartupError
from sapwood.distributed.link import Link, connect
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.output import RankFacts
from sapwood.schema.rank import RankFailed, RankHello, RankPool, RankReady, RankReport
from sapwood.store import ModelFiles
from tests.tiers import long_only
from tests.tiny import save_llama

# ---- rank 0's view, with ranks that are played by the test ---------------------------------------


@contextmanager
def team_of(
    monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Iterator[tuple[RankTeam, queue.SimpleQueue[str], EngineConfig]]:
    """(a team of two nodes with a rank each, its failures, its options)"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = EngineConfig.of(
        {
            "model": "none",
            "tp_size": 2,
            "nnodes": 2,
            "dist_init_addr": f"127.0.0.1:{port}",
            "dist_timeout": 10.0,
            **options,
        }
    )
    failures: queue.SimpleQueue[str] = queue.SimpleQueue()
    team = RankTeam(config, home=Path(), log_level="error", on_failed=failures.put)
    monkeypatch.setattr(ranks, "GRACE_S", 0.01)
    try:
        yield team, failures, config
    finally:
        team.close()


def join(config: EngineConfig, rank: int = 1, **options: Any) -> Link:
    assert config.parallel.dist_init_addr is not None
    link = connect("127.0.0.1", int(config.parallel.dist_init_addr.split(":")[1]), timeout_s=5.0)
    theirs = {**config.flat(), "node_rank": 1, **options}
    say(link, RankHello(rank=rank, pid=1, host="other", options=theirs))
    return link


def say(link: Link, report: RankReport) -> None:
    link.send(msgspec.msgpack.encode(report))


def test_the_smallest_pool_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with team_of(monkeypatch) as (team, _, config):
        rank = join(config)
        say(rank, RankPool(max_total_tokens=512))
        assert team.smallest_pool(1024) == 512
        say(rank, RankPool(max_total_tokens=4096))
        assert team.smallest_pool(1024) == 1024
        facts = RankFacts(rank=1, stage=0, host="other", pid=1, device="cpu", num_threads=1)
        say(rank, RankReady(facts=facts))
        assert team.ready() == [facts]
        rank.close()


@pytest.mark.parametrize("last_words", ["out of paper", None])
def test_a_rank_that_fails_or_goes_is_the_reason(
    monkeypatch: pytest.MonkeyPatch, last_words: str | None
) -> None:
    with team_of(monkeypatch) as (team, failures, config):
        rank = join(config)
        if last_words is not None:
            say(rank, RankFailed(reason=last_words))
        rank.close()
        reason = last_words or "rank 1 on other has ended"
        assert reason in failures.get(timeout=10.0)
        with pytest.raises(RankLost, match=reason):
            team.ready()


def test_other_options_on_another_machine_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with team_of(monkeypatch) as (_, failures, config):
        rank = join(config, num_threads=7, page_size=32)
        assert "page_size = 32, but rank 0 with None" in failures.get(timeout=10.0)
        assert rank.receive() is None
        rank.close()


@pytest.mark.parametrize("rank", [0, 2])
def test_who_is_no_rank_is_sent_away(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    with team_of(monkeypatch, dist_timeout=0.1) as (team, _, config):
        stranger = join(config, rank)
        assert stranger.receive() is None
        stranger.close()
        with pytest.raises(StartupError, match=r"--dist-timeout.*connected: 1"):
            team.start(None, 0)  # type: ignore[arg-type]  # it is not sent


# ---- engines of two ranks ------------------------------------------------------------------------

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], list(range(40))]
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0, "max_new_tokens": 12},
    {"temperature": 1.0, "seed": 3, "max_new_tokens": 12, "repetition_penalty": 1.3},
    {"temperature": 0, "max_new_tokens": 4, "regex": "[a-c]{4}"},
]


def outputs(llm: LLM) -> list[tuple[int, ...]]:
    return [result.token_ids for result in llm.generate(PROMPTS, SAMPLING)]


def outputs_for_ever(llm: LLM) -> None:
    while True:
        outputs(llm)


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers with weights in a file: random weights would differ from stage to stage."""
    directory = tmp_path_factory.mktemp("models") / "saved-llama"
    return save_llama(directory, num_hidden_layers=4, tie_word_embeddings=True)


@pytest.mark.parametrize(
    "options",
    [
        {"pp_size": 2},
        *long_only(
            {"pp_size": 3, "pp_layer_partition": "1,2,1", "pp_max_micro_batch_size": 1},
            {"pp_size": 2, "tp_size": 2, "overlap_depth": 3},
            {"pp_size": 2, "disable_overlap_schedule": True, "speculative_algorithm": "NGRAM"},
            {"pp_size": 2, "chunked_prefill_size": 16, "disable_radix_cache": True},
        ),
    ],
)
def test_stages_answer_as_one_rank(
    make_llm: Callable[..., LLM], saved_llama: Path, options: dict[str, Any]
) -> None:
    usual = {"model": saved_llama, "load_format": "auto"}
    alone, staged = make_llm(**usual), make_llm(**usual, **options)
    assert outputs(staged) == outputs(alone)
    facts = staged.services.engine.info.ranks
    num_stages, num_parts = options["pp_size"], options.get("tp_size", 1)
    assert facts[0].stage == num_stages - 1, "the scheduler is where the logits are"
    assert sorted(rank.stage for rank in facts) == sorted([*range(num_stages)] * num_parts)
    size = (saved_llama / "model.safetensors").stat().st_size
    embedding = 4 * 96 * 260  # in the first stage and in the last
    assert size * 0.95 < sum(rank.read_bytes for rank in facts) <= size + num_parts * embedding


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"pp_size": 3}, "--pp-size is 3, but the model has 2 layers"),
        ({"pp_size": 2, "pp_layer_partition": "1,2"}, "is for 3 layers, but the model has 2"),
    ],
)
def test_what_stages_cannot_do_is_refused(
    make_llm: Callable[..., LLM], options: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        make_llm(**options)


@pytest.mark.long  # the same with random weights runs above
@pytest.mark.parametrize("options", [{"pp_size": 2}, {"tp_size": 3}, {"pp_size": 3}])
def test_smollm2_says_the_same_over_ranks(
    make_llm: Callable[..., LLM], smollm2_files: ModelFiles, options: dict[str, Any]
) -> None:
    """Its 9 heads can be shared by 3 ranks, and not by 2."""
    usual = {"model": smollm2_files.name, "load_format": "auto", "max_total_tokens": 2048}
    prompts = ["The capital of Japan is", "Once upon a time there was a", "def fibonacci(n):"]
    sampling = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    alone, over_ranks = (
        [result.token_ids for result in make_llm(**usual, **one).generate(prompts, sampling)]
        for one in ({}, options)
    )
    assert over_ranks == alone


@pytest.mark.long  # tests/e2e/test_restart.py does the same over HTTP
def test_two_ranks_answer_as_one_until_one_is_killed(make_llm: Callable[..., LLM]) -> None:
    expected = outputs(make_llm())
    llm = make_llm(tp_size=2)
    assert outputs(llm) == expected
    facts = llm.services.engine.info.ranks
    assert [rank.rank for rank in facts] == [0, 1]
    assert facts[0].pid == os.getpid() != facts[1].pid
    os.kill(facts[1].pid, signal.SIGKILL)
    with pytest.raises(EngineUnavailable, match="rank 1 was ended by signal SIGKILL"):
        outputs_for_ever(llm)


def test_ranks_on_two_machines(make_llm: Callable[..., LLM], tiny_llama: Path) -> None:
    """Both "machines" are this one; they know of each other by --dist-init-addr alone."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    same = {"tp_size": 2, "nnodes": 2, "dist_init_addr": address, "overlap_depth": 2}
    flags = {"load_format": "dummy", "dtype": "float32", "max_total_tokens": 2048, **same}
    command = [sys.executable, "-m", "sapwood", "serve", str(tiny_llama), "--node-rank", "1"]
    for name, value in flags.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    with subprocess.Popen(command) as node:
        llm = make_llm(**same)
        assert outputs(llm) == outputs(make_llm())
        assert [rank.stage for rank in llm.services.engine.info.ranks] == [0, 0]
        llm.close()
        assert node.wait(30.0) == 0
