"""The gateway over two engines that serve gRPC, of which one is killed while it generates."""

from __future__ import annotations

import asyncio
import signal
from contextlib import ExitStack
from pathlib import Path

import httpx

from sapwood.gateway.worker import WorkerState
from tests.e2e.server import Server, serving
from tests.gateway.stubs import bench

PROMPTS = [f"Tell me about tree number {number}." for number in range(12)]


def test_texts_are_those_by_http_and_survive_an_engine(qwen3: Path, qwen3_server: Server) -> None:
    def body(prompt: str) -> dict[str, object]:
        message = {"role": "user", "content": prompt}
        return {"messages": [message], "max_tokens": 100, "temperature": 0}

    def text(answer: httpx.Response) -> str:
        return str(answer.raise_for_status().json()["choices"][0]["message"]["content"])

    with httpx.Client(base_url=qwen3_server.url, timeout=60, trust_env=False) as client:
        expected = [text(client.post("/v1/chat/completions", json=body(one))) for one in PROMPTS]

    async def run(urls: list[str], killed: Server) -> None:
        options = {"worker_urls": ",".join(urls), "model_path": str(qwen3)}
        async with bench(wait=False, limit_s=120, retry_max_retries=5, **options) as made:
            workers = list(made.gateway.fleet)
            while any(worker.state is not WorkerState.READY for worker in workers):
                await asyncio.sleep(0.01)
            path = "/v1/chat/completions"

            async def ask(prompt: str) -> str | None:
                answer = await made.client.post(path, json=body(prompt))
                if answer.status_code == 502:
                    return None  # it had begun, and broke off
                return text(answer)

            asked = [asyncio.create_task(ask(one)) for one in PROMPTS]
            while not any(worker.url == killed.url and worker.num_open for worker in workers):
                await asyncio.sleep(0.001)
            killed.process.send_signal(signal.SIGKILL)
            answers = await asyncio.gather(*asked)
            for answer, wanted in zip(answers, expected, strict=True):
                assert answer in (wanted, None)
            assert [await ask(one) for one in PROMPTS[:3]] == expected[:3]
            assert made.num_open() == 0

    with ExitStack() as stack:
        flags = ("--model", str(qwen3), "--dtype", "float32", "--grpc-mode")
        servers = [stack.enter_context(serving(*flags)) for _ in range(2)]
        asyncio.run(run([one.url for one in servers], servers[0]))
