"""Two servers on one directory, or one Redis, under load; one is killed. Nothing wrong is read.

`make test-long` runs it for three minutes each; SHARED_STORAGE_S says otherwise."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.server import Server, serving
from tests.history.servers import redis_server
from tests.tiny import save_llama

SECONDS = float(os.environ.get("SHARED_STORAGE_S", "180"))
NUM_PROMPTS, NUM_OUTPUTS, NUM_CLIENTS = 40, 8, 3
PAGE = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("shared-storage"))


@pytest.fixture(params=["file", "redis"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A storage that has room for a part of the prompts only."""
    extra = {"prefetch_threshold": PAGE, "prefetch_timeout_base": 2.0}
    if request.param == "file":
        yield "file", {**extra, "directory": str(tmp_path / "kv"), "max_gb": 0.0005}
        return
    with redis_server() as url:
        yield "redis", {**extra, "url": url, "ttl_s": 20}


def prompts() -> list[list[int]]:
    """Three turns of conversations, of which many begin alike."""
    rng = random.Random(5)
    begins = [[rng.randrange(3, 250) for _ in range(40)] for _ in range(NUM_PROMPTS // 5)]
    return [
        [*begins[index % len(begins)], *(rng.randrange(3, 250) for _ in range(30 + index))]
        for index in range(NUM_PROMPTS)
    ]


def answer(client: httpx.Client, prompt: list[int]) -> dict[str, Any]:
    params = {"max_new_tokens": NUM_OUTPUTS, "temperature": 0, "ignore_eos": True}
    told = client.post("/generate", json={"input_ids": prompt, "sampling_params": params})
    found: dict[str, Any] = told.raise_for_status().json()
    return found


def flags(model: Path, *more: str) -> list[str]:
    own = ["--model", str(model), "--max-total-tokens", "512", "--page-size", str(PAGE)]
    return [*own, "--dtype", "float32", "--num-threads", "1", "--cpu-products", "exact", *more]


class Load:
    """Clients of one server that ask at random until they are stopped."""

    def __init__(self, server: Server, expected: list[list[int]]) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._server = server
        self._expected = expected
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(seed,)) for seed in range(NUM_CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, seed: int) -> None:
        rng, asked = random.Random(seed), prompts()
        with httpx.Client(base_url=self._server.url, timeout=60) as client:
            while not self._is_over.is_set():
                at = rng.randrange(len(asked))
                start_s = time.monotonic()
                try:
                    told = answer(client, asked[at])
                except httpx.HTTPError as error:
                    if not self._is_over.is_set():  # else the server was killed
                        self.wrong.append(f"{error}\n{self._server.log[-3000:]}")
                    return
                self.counts["longest wait, ms"] = max(
                    self.counts["longest wait, ms"], int(1e3 * (time.monotonic() - start_s))
                )
                self.counts["requests"] += 1
                tiers = told["meta_info"].get("cached_tokens_details") or {}
                self.counts["tokens from storage"] += tiers.get("storage", 0)
                if told["output_ids"] != self._expected[at]:
                    self.wrong.append(f"prompt {at}: {told['output_ids']}, {tiers}")


@pytest.mark.long
@pytest.mark.timeout(2 * SECONDS + 400)
def test_nothing_wrong_is_read_while_two_serve_and_one_is_killed(
    model: Path, storage: tuple[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    name, extra = storage
    with serving(*flags(model)) as plain, httpx.Client(base_url=plain.url, timeout=60) as client:
        expected = [answer(client, prompt)["output_ids"] for prompt in prompts()]
    shared = flags(
        model, "--enable-hierarchical-cache", "--hicache-ratio", "1",
        "--hicache-storage-backend", name,
        "--hicache-storage-backend-extra-config", json.dumps(extra),
    )  # fmt: skip
    with ExitStack() as stack:
        survivor = stack.enter_context(serving(*shared))
        begin_s, loads, num_killed = time.monotonic(), [Load(survivor, expected)], 0
        try:
            while time.monotonic() - begin_s < SECONDS:
                with serving(*shared) as victim:
                    load = Load(victim, expected)
                    time.sleep(min(SECONDS / 4, 20.0))
                    load._is_over.set()
                    processes = psutil.Process(victim.process.pid)
                    for one in [*processes.children(recursive=True), processes]:
                        one.kill()  # in the middle of what it writes
                    load.end()
                    loads.append(load)
                    num_killed += 1
        finally:
            for load in loads:
                load.end()
        counters = survivor.counters()
    total: Counter[str] = Counter()
    for load in loads:
        assert load.wrong == []
        total.update(load.counts)
    with capsys.disabled():
        sys.stdout.write(f"\n{name}: {dict(total)}, {num_killed} killed; {counters['tiers']}\n")
    assert total["tokens from storage"] > 0
    assert loads[0].counts["requests"] > 50
    assert num_killed > 0
