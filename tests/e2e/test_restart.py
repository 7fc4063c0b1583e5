"""An engine that is killed: every stream hears of it, and another one takes its place."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.server import Server, serving

NUM_STREAMS = 32
LIMIT_S = 2.0
LONG = {"input_ids": [1, 2, 3], "stream": True}


def flags(model: Path, *more: str) -> list[str]:
    pool = ["--max-total-tokens", str(NUM_STREAMS * 8192)]
    return ["--model", str(model), "--load-format", "dummy", *pool, *more]


async def read_stream(client: httpx.AsyncClient, begun: asyncio.Semaphore) -> tuple[str, float]:
    """The last event of a stream, and when it came."""
    body = {**LONG, "sampling_params": {"max_new_tokens": 8000, "ignore_eos": True}}
    last = ""
    async with client.stream("POST", "/generate", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                if not last:
                    begun.release()
                last = line[6:]
    return last, time.monotonic()


async def kill_amid_streams(server: Server, pid: int | None = None) -> list[str]:
    """Kill the engine in the middle of all streams; their last events, all in time.

    pid  of another process than the engine's, to be killed instead"""
    begun = asyncio.Semaphore(0)
    limits = httpx.Limits(max_connections=NUM_STREAMS + 4)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
        readers = [asyncio.create_task(read_stream(client, begun)) for _ in range(NUM_STREAMS)]
        for _ in range(NUM_STREAMS):
            await asyncio.wait_for(begun.acquire(), 60)
        killed_s = time.monotonic()
        os.kill(pid or server.engine_pid(), signal.SIGKILL)
        ended = await asyncio.gather(*readers)
    assert max(at_s for _, at_s in ended) - killed_s < LIMIT_S
    return [last for last, _ in ended]


def wait_for_health(server: Server, status: int, limit_s: float = 60.0) -> httpx.Response:
    end = time.monotonic() + limit_s
    while True:
        response = httpx.get(f"{server.url}/health", timeout=10)
        if response.status_code == status:
            return response
        assert time.monotonic() < end, response.text
        time.sleep(0.05)


def test_killed_amid_32_streams_without_restart(long_model: Path) -> None:
    with serving(*flags(long_model)) as server:
        for last in asyncio.run(kill_amid_streams(server)):
            assert "SIGKILL" in json.loads(last)["error"]["message"]
        assert server.process.wait(30) == 1
        assert "SIGKILL" in server.log.strip().splitlines()[-1]


def test_killed_amid_32_streams_and_restarted(long_model: Path) -> None:
    more = ["--restart-engine", "--max-engine-restarts", "2"]
    with serving(*flags(long_model, *more)) as server:
        api_pid = server.process.pid
        ask = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
        expected = httpx.post(f"{server.url}/generate", json=ask).json()["output_ids"]
        for _ in range(2):
            for last in asyncio.run(kill_amid_streams(server)):
                assert "SIGKILL" in json.loads(last)["error"]["message"]
            down = wait_for_health(server, 503)
            assert "SIGKILL" in down.text
            assert "Retry-After" in down.headers
            refused = httpx.post(f"{server.url}/generate", json=ask)
            assert refused.status_code == 503
            wait_for_health(server, 200)
            again = httpx.post(f"{server.url}/generate", json=ask, timeout=60).json()
            assert again["output_ids"] == expected
            assert server.counters()["num_leased_pages"] == 0
        assert server.process.poll() is None
        assert server.process.pid == api_pid
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert server.process.wait(30) == 1
        assert "after 2 restarts" in server.log.strip().splitlines()[-1]
        assert "Traceback" not in server.log


def rank_pid(server: Server, rank: int = 1) -> int:
    """Process of a rank."""
    ranks = httpx.get(f"{server.url}/server_info", timeout=30).json()["ranks"]
    return int(ranks[rank]["pid"])


@pytest.mark.parametrize(
    ("layout", "rank"),
    [
        (("--tp-size", "2"), 1),
        pytest.param(("--pp-size", "2"), 1, marks=pytest.mark.long),
        pytest.param(("--pp-size", "2", "--tp-size", "2"), 3, marks=pytest.mark.long),
    ],
)
def test_a_rank_killed_amid_32_streams(
    long_model: Path, layout: tuple[str, ...], rank: int
) -> None:
    with serving(*flags(long_model, *layout)) as server:
        health = httpx.get(f"{server.url}/health").json()
        assert [one["rank"] for one in health["ranks"]][: rank + 1] == list(range(rank + 1))
        for last in asyncio.run(kill_amid_streams(server, rank_pid(server, rank))):
            message = json.loads(last)["error"]["message"]
            assert f"the process of rank {rank} was ended by signal SIGKILL" in message
        assert server.process.wait(30) == 1
        assert f"rank {rank} was ended by signal SIGKILL" in server.log.strip().splitlines()[-1]


@pytest.mark.long
@pytest.mark.parametrize("layout", ["--tp-size", "--pp-size"])
def test_an_engine_is_restarted_when_any_of_its_ranks_is_killed(
    long_model: Path, layout: str
) -> None:
    with serving(*flags(long_model, layout, "2", "--restart-engine")) as server:
        ask = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
        expected = httpx.post(f"{server.url}/generate", json=ask).json()["output_ids"]
        for find in (rank_pid, Server.engine_pid):
            pid = find(server)
            asyncio.run(kill_amid_streams(server, pid))
            wait_for_health(server, 503)
            wait_for_health(server, 200)
            again = httpx.post(f"{server.url}/generate", json=ask, timeout=60).json()
            assert again["output_ids"] == expected
            assert not psutil.pid_exists(pid)


def test_a_server_whose_engine_is_down_stops_in_order(long_model: Path) -> None:
    with serving(*flags(long_model, "--restart-engine")) as server:
        os.kill(server.engine_pid(), signal.SIGKILL)
        wait_for_health(server, 503)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.log
