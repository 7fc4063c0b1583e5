"""Replicas that share feed-forwards, over HTTP: one of them is killed."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.server import serving
from tests.e2e.test_replicas import read_stream

NUM_STREAMS = 6
LIMIT_S = 60.0


async def kill_one_amid_streams(url: str, engines: list[psutil.Process]) -> list[dict[str, Any]]:
    begun = asyncio.Semaphore(0)
    limits = httpx.Limits(max_connections=NUM_STREAMS)
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S, limits=limits) as client:
        readers = [asyncio.create_task(read_stream(client, begun)) for _ in range(NUM_STREAMS)]
        for _ in range(NUM_STREAMS):
            await asyncio.wait_for(begun.acquire(), LIMIT_S)
        os.kill(engines[1].pid, signal.SIGKILL)
        return await asyncio.gather(*readers)


@pytest.mark.long
def test_all_end_when_one_is_killed(long_model: Path) -> None:
    with serving(
        *("--model", str(long_model), "--load-format", "dummy", "--max-total-tokens", "65536"),
        *("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"),
    ) as server:
        answer = httpx.get(f"{server.url}/v1/loads", timeout=LIMIT_S).json()
        assert [load["dp_rank"] for load in answer["loads"]] == [0, 1]
        engines = [
            child
            for child in psutil.Process(server.process.pid).children()
            if "sapwood.app.building.engine_process" in child.cmdline()
        ]
        assert len(engines) == 2
        ends = asyncio.run(kill_one_amid_streams(server.url, engines))
        assert all("SIGKILL" in end["error"]["message"] for end in ends)
        assert server.process.wait(LIMIT_S) == 1
        assert "the engine failed: replica" in server.log
        psutil.wait_procs(engines, timeout=LIMIT_S)
        assert not any(engine.is_running() for engine in engines)
