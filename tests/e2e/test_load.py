"""Many clients at once, some of which go away."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from sapwood.store import ModelFiles
from tests.e2e.server import Server, serving

NUM_REQUESTS = 200
NUM_WARM_UP = 120
"""Of a first round that is not measured: enough to have written to each page of the pool."""
POOL_TOKENS = 4096
"""Less than 64 requests want at a time, so that prefixes are evicted and requests wait."""
CONCURRENCY = 64
OUTPUT_TOKENS = 24
PREFIX = 256


@dataclass
class Stream:
    prompt: list[int]
    leaves_after: int | None
    tokens: int = 0
    finish: str | None = None


async def lines_of(response: httpx.Response) -> AsyncIterator[str]:
    """httpx's own lines also end at characters such as U+0085, which JSON may have in a text."""
    rest = b""
    async for piece in response.aiter_bytes():
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line.decode()


async def consume(client: httpx.AsyncClient, stream: Stream) -> None:
    body = {
        "prompt": stream.prompt,
        "max_tokens": OUTPUT_TOKENS,
        "min_tokens": OUTPUT_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    num_events = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in lines_of(response):
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            num_events += 1
            if event["choices"]:
                stream.finish = event["choices"][0]["finish_reason"]
            elif event.get("usage"):
                stream.tokens = event["usage"]["completion_tokens"]
            if num_events == stream.leaves_after:
                return


async def run_round(url: str, num_requests: int, seed: int, vocab: int) -> list[Stream]:
    """Requests, 64 at a time; a third leave after a few events."""
    rng = random.Random(seed)
    streams = [
        Stream(
            prompt=[rng.randrange(vocab) for _ in range(rng.randint(4, 60))],
            leaves_after=rng.randint(1, 10) if index % 3 == 0 else None,
        )
        for index in range(num_requests)
    ]
    slots = asyncio.Semaphore(CONCURRENCY)
    limits = httpx.Limits(max_connections=CONCURRENCY)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def one(stream: Stream) -> None:
            async with slots:
                await consume(client, stream)

        await asyncio.gather(*(one(stream) for stream in streams))
    return streams


def test_disconnects_disturb_nobody_and_leak_nothing(long_model: Path) -> None:
    flags = ("--model", str(long_model), "--load-format", "dummy")
    with serving(*flags, "--max-total-tokens", str(POOL_TOKENS)) as server:
        # Whoever leaves does so long before the end, however fast the model is.
        body = {"forward_sleep_time": 0.005}
        httpx.post(f"{server.url}/slow_down", json=body).raise_for_status()
        resident = run_rounds(server, vocab=256)
    # A leak would show in every round, and the last two are alike.
    assert resident[2] <= 1.05 * resident[1]


@pytest.mark.long
def test_the_same_with_a_real_model(smollm2_files: ModelFiles) -> None:
    flags = ("--model", smollm2_files.name, "--max-total-tokens", str(POOL_TOKENS))
    with serving(*flags) as server:
        resident = run_rounds(server, vocab=40_000)
    assert resident[2] <= 1.05 * resident[1]


@pytest.mark.long
@pytest.mark.parametrize(
    "layout",
    [
        ("--tp-size", "2"),
        ("--pp-size", "2"),
        ("--pp-size", "2", "--tp-size", "2"),
        ("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"),
    ],
)
def test_the_same_over_several_ranks(long_model: Path, layout: tuple[str, ...]) -> None:
    flags = ("--model", str(long_model), "--load-format", "dummy", *layout)
    with serving(*flags, "--max-total-tokens", str(POOL_TOKENS)) as server:
        body = {"forward_sleep_time": 0.005}
        httpx.post(f"{server.url}/slow_down", json=body).raise_for_status()
        resident = run_rounds(server, vocab=256)
    assert resident[2] <= 1.05 * resident[1]


def run_rounds(server: Server, vocab: int) -> list[int]:
    """Resident bytes after each of three rounds, the first of them to warm up."""
    resident: list[int] = []
    for seed, num_requests in enumerate((NUM_WARM_UP, NUM_REQUESTS, NUM_REQUESTS)):
        before = server.counters()
        streams = asyncio.run(run_round(server.url, num_requests, seed, vocab))
        stayed = [stream for stream in streams if stream.leaves_after is None]
        assert all(stream.finish == "length" for stream in stayed)
        assert all(stream.tokens == OUTPUT_TOKENS for stream in stayed)
        after = server.wait_until_idle()
        assert after["num_leased_pages"] == 0
        ended = {name: after[name] - before[name] for name in ("num_finished", "num_aborted")}
        assert sum(ended.values()) == num_requests
        # The slower the machine, the fewer leave before their stream has ended.
        assert ended["num_aborted"] > num_requests // 12
        assert httpx.post(f"{server.url}/flush_cache").status_code == 200
        counters = server.counters()
        assert counters["num_free_pages"] == counters["num_pages"]
        resident.append(server.resident_bytes())
    return resident


def test_one_prefix_of_32_requests_is_computed_once(server: Server) -> None:
    httpx.post(f"{server.url}/flush_cache").raise_for_status()
    rng = random.Random(5)
    prefix = [rng.randrange(100, 40000) for _ in range(PREFIX)]
    before = server.wait_until_idle()

    async def ask() -> list[int]:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
            answers = await asyncio.gather(
                *(
                    client.post(
                        "/v1/completions",
                        json={
                            "prompt": [*prefix, *range(1000 + 40 * index, 1032 + 40 * index)],
                            "max_tokens": 4,
                            "temperature": 0,
                        },
                    )
                    for index in range(32)
                )
            )
        return [
            answer.raise_for_status().json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            for answer in answers
        ]

    cached = asyncio.run(ask())
    assert sorted(cached) == [0] + [PREFIX] * 31
    after = server.counters()
    computed = after["num_computed_tokens"] - before["num_computed_tokens"]
    assert computed <= PREFIX + 32 * (32 + 4)
