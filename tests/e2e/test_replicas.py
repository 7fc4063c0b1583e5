"""Two replicas behind one server: figures, requests for one of them, and one that is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.server import Server, serving

NUM_STREAMS = 12
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def replicated(long_model: Path) -> Iterator[Server]:
    pool = str(NUM_STREAMS * 8192)
    with serving(
        *("--model", str(long_model), "--load-format", "dummy", "--max-total-tokens", pool),
        *("--dp-size", "2", "--restart-engine", "--enable-metrics"),
    ) as server:
        yield server


def get(server: Server, path: str) -> Any:
    return httpx.get(f"{server.url}{path}", timeout=30).raise_for_status().json()


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_each_replica_has_figures_of_its_own(replicated: Server) -> None:
    assert "2 replicas" in replicated.log
    answer = get(replicated, "/v1/loads")
    assert answer["dp_rank_count"] == 2
    assert [load["dp_rank"] for load in answer["loads"]] == [0, 1]
    assert [load["dp_rank"] for load in get(replicated, "/get_load")] == [0, 1]
    [load] = get(replicated, "/v1/loads?dp_rank=1")["loads"]
    assert load["dp_rank"] == 1
    metrics = httpx.get(f"{replicated.url}/metrics").text
    for rank in (0, 1):
        assert f'sapwood:engine_up{{dp_rank="{rank}",' in metrics
        assert metrics.count(f'dp_rank="{rank}"') > 20
    assert metrics.count("# TYPE sapwood:num_running_reqs gauge") == 1
    assert len(get(replicated, "/server_info")["internal_states"]) == 2


def test_a_request_can_name_its_replica(replicated: Server) -> None:
    body = {"input_ids": [[1, 2, 3]] * 3, "sampling_params": {"max_new_tokens": 2}}

    def num_finished() -> list[int]:
        states = get(replicated, "/server_info")["internal_states"]
        return [state["num_finished"] for state in states]

    before = num_finished()
    for name in ("data_parallel_rank", "routed_dp_rank"):
        answer = httpx.post(f"{replicated.url}/generate", json=body | {name: 1}, timeout=60)
        assert len(answer.raise_for_status().json()) == 3
    assert num_finished() == [before[0], before[1] + 6]
    refused = httpx.post(f"{replicated.url}/generate", json=body | {"data_parallel_rank": 2})
    assert refused.status_code == 400
    assert "replicas 0 to 1" in refused.text


async def read_stream(client: httpx.AsyncClient, begun: asyncio.Semaphore) -> dict[str, Any]:
    body = {
        "input_ids": [1, 2, 3],
        "stream": True,
        "sampling_params": {"max_new_tokens": 8000, "ignore_eos": True},
    }
    last = ""
    async with client.stream("POST", "/generate", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                if not last:
                    begun.release()
                last = line[6:]
    return json.loads(last)


async def kill_one_amid_streams(server: Server) -> list[dict[str, Any]]:
    begun = asyncio.Semaphore(0)
    limits = httpx.Limits(max_connections=NUM_STREAMS + 4)
    async with httpx.AsyncClient(base_url=server.url, timeout=LIMIT_S, limits=limits) as client:
        readers = [asyncio.create_task(read_stream(client, begun)) for _ in range(NUM_STREAMS)]
        for _ in range(NUM_STREAMS):
            await asyncio.wait_for(begun.acquire(), LIMIT_S)
        engines = psutil.Process(server.process.pid).children()
        victim = next(
            one for one in engines if "sapwood.app.building.engine_process" in one.cmdline()
        )
        os.kill(victim.pid, signal.SIGKILL)
        await asyncio.wait(readers, return_when=asyncio.FIRST_COMPLETED)
        # The others are still at work, and new requests are answered.
        assert (await client.get("/health")).status_code == 200
        body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 2}}
        assert (await client.post("/generate", json=body)).status_code == 200
        await client.post("/abort_request", json={"abort_all": True})
        return await asyncio.gather(*readers)


def test_one_is_killed_and_the_other_goes_on(replicated: Server) -> None:
    ends = asyncio.run(kill_one_amid_streams(replicated))
    errors = [end["error"]["message"] for end in ends if "error" in end]
    aborted = [end for end in ends if "error" not in end]
    assert len(errors) == len(aborted) == NUM_STREAMS // 2
    assert all("SIGKILL" in message for message in errors)
    assert all(end["meta_info"]["finish_reason"]["type"] == "abort" for end in aborted)
    until(lambda: len(get(replicated, "/v1/loads")["loads"]) == 2)
    for load in get(replicated, "/server_info")["internal_states"]:
        assert load["num_leased_pages"] == 0
        assert load["memory_usage"]["token_capacity"] == NUM_STREAMS * 8192
    assert "is ready again" in replicated.log
    assert "Traceback" not in replicated.log
