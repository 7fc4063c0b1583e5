from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import uvicorn

from sapwood.frontends.batches.runner import BatchRunner
from sapwood.frontends.batches.store import BatchStore
from sapwood.frontends.server import Stores, create_app, inner_app
from sapwood.frontends.serving.services import Services
from sapwood.http.in_process import in_process
from tests.frontends.conftest import wait_until
from tests.scripted import MakeServices, scripted_services


@pytest.fixture
def make_services() -> MakeServices:
    return scripted_services


class BatchServer:
    """The application over HTTP, and on the same loop the runner of its batches, if it runs."""

    def __init__(self, services: Services, directory: Path, concurrency: int = 4) -> None:
        self.store = BatchStore(directory)
        stores = Stores(batches=self.store)
        self._runner = BatchRunner(
            self.store,
            services,
            in_process(inner_app(services, stores=stores)),
            concurrency=concurrency,
            priority=-100,
        )
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(
                create_app(services, stores=stores),
                log_level="warning",
                ws="none",
                lifespan="off",
            )
        )
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        wait_until(lambda: self._server.started)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._server.serve([self._socket])
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def start_runner(self) -> None:
        def start() -> None:
            self._task = asyncio.create_task(self._runner.run())

        self._loop.call_soon_threadsafe(start)
        wait_until(lambda: self._task is not None)

    def close(self) -> None:
        """As the end of a server does it; a second time it is no harm."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
        self.store.close()


@pytest.fixture
def serve(services: Services, tmp_path: Path) -> Iterator[Callable[..., BatchServer]]:
    """Starts a server on the test's directory; the engine is the one of the fixture `engine`."""
    servers: list[BatchServer] = []

    def start(*, runs: bool = True, concurrency: int = 4) -> BatchServer:
        servers.append(BatchServer(services, tmp_path, concurrency))
        if runs:
            servers[-1].start_runner()
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def client_of() -> Iterator[Callable[[BatchServer], openai.OpenAI]]:
    clients: list[openai.OpenAI] = []

    def make(server: BatchServer) -> openai.OpenAI:
        url = f"{server.url}/v1"
        clients.append(openai.OpenAI(base_url=url, api_key="none", max_retries=0))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
