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
from sapwood.app.engine_start import refuse_placement
from sapwood.base.errors import ConfigError
from sapwood.schema.config.engine import EngineConfig
from tests.e2e.server import Server, serving

LIMIT_S = 120.0
BODY = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}


def flags(model: Path, *layout: str) -> tuple[str, ...]:
    common = ("--load-format", "dummy", "--dtype", "float32", "--max-total-tokens", "2048")
    return ("--model", str(model), *common, "--num-threads", "1", "--placement", "ray", *layout)


def processes(server: Server, module: str) -> list[psutil.Process]:
    """Of this module, among those of the server and its cluster."""
    found = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if module in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


def expected_of(model: Path) -> list[int]:
    options: dict[str, Any] = {"load_format": "dummy", "dtype": "float32", "num_threads": 1}
    with LLM(str(model), max_total_tokens=2048, **options) as llm:
        (result,) = llm.generate([[1, 2, 3]], [BODY["sampling_params"]])
    return list(result.token_ids)


@pytest.mark.long
def test_replicas_answer_and_one_that_is_killed_is_replaced(tiny_llama: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'sapwood[ray]'")
    expected = expected_of(tiny_llama)
    with serving(*flags(tiny_llama, "--dp-size", "2", "--restart-engine")) as server:
        answers = [
            httpx.post(f"{server.url}/generate", json=BODY | {"data_parallel_rank": rank})
            for rank in (0, 1)
        ]
        assert [one.json()["output_ids"] for one in answers] == [expected] * 2
        engines = processes(server, "sapwood.app.engine_process")
        assert len(engines) == 2
        actor = engines[0].parent()
        assert actor is not None
        assert "ray::" in "".join(actor.cmdline())
        os.kill(actor.pid, signal.SIGKILL)
        end = time.monotonic() + LIMIT_S
        while True:
            answer = httpx.post(f"{server.url}/generate", json=BODY, timeout=LIMIT_S)
            if answer.status_code == 200:
                assert answer.json()["output_ids"] == expected
            alive = processes(server, "sapwood.app.engine_process")
            if len(alive) == 2 and engines[0].pid not in {one.pid for one in alive}:
                break
            assert time.monotonic() < end
            time.sleep(0.2)
        for rank in (0, 1):
            body = BODY | {"data_parallel_rank": rank}
            while True:
                answer = httpx.post(f"{server.url}/generate", json=body, timeout=LIMIT_S)
                if answer.status_code == 200:
                    break
                assert time.monotonic() < end, answer.text
                time.sleep(0.2)
            assert answer.json()["output_ids"] == expected
        running = processes(server, "sapwood.app.engine_process")
    _, alive = psutil.wait_procs(running, timeout=LIMIT_S)
    assert not alive


@pytest.mark.long
def test_ranks_of_two_bundles_are_one_engine(tiny_llama: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'sapwood[ray]'")
    layout = ("--tp-size", "2", "--nnodes", "2")
    with serving(*flags(tiny_llama, *layout)) as server:
        answer = httpx.post(f"{server.url}/generate", json=BODY, timeout=LIMIT_S)
        assert answer.json()["output_ids"] == expected_of(tiny_llama)
        (rank,) = processes(server, "sapwood.app.rank_process")
        os.kill(rank.pid, signal.SIGKILL)
        assert server.process.wait(LIMIT_S) == 1
        assert "rank 1" in server.log


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


def test_only_a_server_is_placed() -> None:
    with pytest.raises(ConfigError, match="is for `sapwood serve`"):
        refuse_placement(EngineConfig.of({"model": "none", "placement": "ray"}))
