"""300 malformed requests beside healthy streams: each is refused, and nobody else notices."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.malformed import Case, answer_to, cases
from tests.e2e.server import Server, serving
from tests.tiny import write_llama

NUM_CASES = 300
FLAGS = ("--request-header-timeout", "2", "--request-body-timeout", "2")
MAX_ANSWER_BYTES = 8192
"""A refusal is a message to a person; it does not give the request back."""
HEALTHY = {
    "input_ids": [72, 105],
    "stream": True,
    "sampling_params": {"max_new_tokens": 64, "temperature": 0, "ignore_eos": True},
}


class HealthyStreams(threading.Thread):
    """Asks for the same stream again and again."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.outputs: list[list[int]] = []
        self.done = threading.Event()
        self.problem: Exception | None = None

    def run(self) -> None:
        try:
            with httpx.Client(base_url=self.url, timeout=30) as client:
                while not self.done.is_set():
                    self.outputs.append(self._one(client))
        except (httpx.HTTPError, AssertionError, KeyError) as error:
            self.problem = error

    def _one(self, client: httpx.Client) -> list[int]:
        last: dict[str, Any] = {}
        with client.stream("POST", "/generate", json=HEALTHY) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    last = json.loads(line[6:])
        return list(last["output_ids"])


def run_cases(server: Server, made: list[Case]) -> list[bytes]:
    host, port = server.url.removeprefix("http://").split(":")
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda case: answer_to(host, int(port), case), made))


def complaint(case: Case, answer: bytes) -> str | None:
    """What is wrong with that answer to that case; None if nothing is."""
    if answer == b"still open":
        return "neither an answer nor an end"
    if not answer:
        may_close = case.kind in ("cut off", "slow", "bad protocol")
        return None if may_close else "the connection was closed without an answer"
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if not 400 <= status < 500:
        return f"status {status}"
    if len(body) > MAX_ANSWER_BYTES:
        return f"{len(body)} bytes in answer"
    if b"Traceback" in body or b".py" in body:
        return "a stack trace"
    if b"content-type: application/json" not in head:
        # What is no HTTP at all never reaches a dialect.
        by_the_server = (
            b"Invalid HTTP request received.",
            b"the request line and the headers have",
        )
        return None if any(text in body for text in by_the_server) else "no JSON"
    told = json.loads(body)
    message = told.get("message") or told.get("error")
    message = message if isinstance(message, str) else (message or {}).get("message")
    return None if message else "no message"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "m", max_position_embeddings=2048)


def test_300_malformed_requests(model: Path) -> None:
    with serving("--model", str(model), "--load-format", "dummy", *FLAGS) as server:
        run_cases(server, cases(100, seed=1))
        idle = server.wait_until_idle()
        resident = server.resident_bytes()
        healthy = HealthyStreams(server.url)
        healthy.start()
        made = cases(NUM_CASES, seed=2)
        answers = run_cases(server, made)
        healthy.done.set()
        healthy.join(30)
        complaints = [
            f"{case.kind}: {what}: {case.raw[:300]!r} -> {answer[:300]!r}"
            for case, answer in zip(made, answers, strict=True)
            if (what := complaint(case, answer)) is not None
        ]
        assert complaints == []
        assert healthy.problem is None
        assert len(healthy.outputs) > 1
        assert all(output == healthy.outputs[0] for output in healthy.outputs)
        assert len(healthy.outputs[0]) == 64
        after = server.wait_until_idle()
        assert after["num_leased_pages"] == 0
        assert httpx.post(f"{server.url}/flush_cache").status_code == 200
        assert server.counters()["num_free_pages"] == idle["num_pages"]
        # 10 MB strings are in it; what they took has gone back, but for what an allocator keeps.
        assert server.resident_bytes() < resident + 64 * 2**20
        assert "Traceback" not in server.log
