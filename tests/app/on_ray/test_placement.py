"""A server whose engines are on a Ray cluster."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from sapwood import LLM
from sapwood.app.on_ray.placement import threads_that_fit
from sapwood.app.serving.engine_start import refuse_placement
from sapwood.base.errors import ConfigError
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.server import ServerConfig
from tests.e2e.server import Server, serving

LIMIT_S = 400.0
"""A cluster and its engines are a dozen processes, which a busy machine starts slowly."""
BODY = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
COMMON = ("--load-format", "dummy", "--dtype", "float32", "--max-total-tokens", "2048")


def flags(model: Path, *layout: str) -> tuple[str, ...]:
    return ("--model", str(model), *COMMON, "--num-threads", "1", "--placement", "ray", *layout)


def processes(of: int, module: str) -> list[psutil.Process]:
    """Those that run this module, among all that this process has started."""
    found = []
    for child in psutil.Process(of).children(recursive=True):
        try:
            if module in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


def ask(server: Server, **more: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/generate", json=BODY | more, timeout=LIMIT_S)


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[int]:
    """The tokens that one engine, of one process, answers."""
    options: dict[str, Any] = {"load_format": "dummy", "dtype": "float32", "num_threads": 1}
    with LLM(str(tiny_llama), max_total_tokens=2048, **options) as llm:
        (result,) = llm.generate([[1, 2, 3]], [BODY["sampling_params"]])
    return list(result.token_ids)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_replicas_answer_and_one_that_is_killed_is_replaced(
    tiny_llama: Path, expected: list[int]
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'sapwood[ray]'")
    with serving(
        *flags(tiny_llama, "--dp-size", "2", "--restart-engine"), start_limit_s=LIMIT_S
    ) as server:
        pid = server.process.pid
        for replica in (0, 1):
            assert ask(server, data_parallel_rank=replica).json()["output_ids"] == expected
        # First an actor is killed, then an engine: its actor lives, but must not keep the room.
        for end_of_engine in (psutil.Process.parent, lambda engine: engine):
            before = processes(pid, "sapwood.app.building.engine_process")
            assert len(before) == 2
            victim = end_of_engine(before[0])
            assert victim is not None
            victim.kill()
            end, statuses = time.monotonic() + LIMIT_S, [0, 0]
            while statuses != [200, 200] or before[0].is_running():
                answers = [ask(server, data_parallel_rank=replica) for replica in (0, 1)]
                statuses = [answer.status_code for answer in answers]
                assert 200 in statuses, statuses
                if 503 in statuses:  # the server knows that one is gone, and asks the other
                    assert ask(server).json()["output_ids"] == expected
                assert time.monotonic() < end, server.log
                time.sleep(0.1)
            assert [answer.json()["output_ids"] for answer in answers] == [expected] * 2
        started = psutil.Process(pid).children(recursive=True)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(LIMIT_S) == 0
    _, alive = psutil.wait_procs(started, timeout=LIMIT_S)
    assert not alive


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ranks_on_two_nodes_are_one_engine(tiny_llama: Path, expected: list[int]) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'sapwood[ray]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, include_dashboard=False)
        layout = ("--tp-size", "2", "--nnodes", "2", "--ray-address", cluster.address)
        with serving(*flags(tiny_llama, *layout), start_limit_s=LIMIT_S) as server:
            assert ask(server).json()["output_ids"] == expected
            (rank,) = processes(os.getpid(), "sapwood.app.ranks.process")
            rank.kill()
            assert server.process.wait(LIMIT_S) == 1
            assert "rank 1" in server.log
    finally:
        cluster.shutdown()


@pytest.mark.parametrize(
    ("cores", "num_bundles", "ranks", "threads"),
    [([8], 2, 1, 4), ([8], 2, 2, 2), ([3, 5], 2, 1, 3), ([2], 4, 1, 1), ([], 1, 1, 1)],
)
def test_each_rank_has_as_many_cores_as_fit(
    cores: list[int], num_bundles: int, ranks: int, threads: int
) -> None:
    assert threads_that_fit(cores, num_bundles, ranks) == threads


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dist_init_addr": "127.0.0.1:29500"}, "--dist-init-addr"),
        ({"nnodes": 2, "tp_size": 2, "node_rank": 1}, "--node-rank"),
        (
            {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True},
            "--enable-dp-attention",
        ),
    ],
)
def test_what_ray_decides_is_not_to_be_said(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=f"placement ray does not go together with {why}"):
        EngineConfig.of({"model": "none", "placement": "ray", **options})


def test_rays_client_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be on a node of the cluster"):
        ServerConfig(ray_address="ray://head:10001")


def test_only_a_server_is_placed() -> None:
    with pytest.raises(ConfigError, match="is for `sapwood serve`"):
        refuse_placement(EngineConfig.of({"model": "none", "placement": "ray"}))
