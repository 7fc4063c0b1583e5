from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from sapwood.frontends.responses.store import ResponseStore
from sapwood.frontends.server import Stores, create_app
from sapwood.frontends.serving.services import Services
from tests.frontends.conftest import Live


class ResponseServer:
    def __init__(self, services: Services, directory: Path | None, retention_days: float) -> None:
        self.store = ResponseStore(directory, retention_days=retention_days)
        self.live = Live(create_app(services, stores=Stores(responses=self.store)))
        self.url = self.live.url
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def close(self) -> None:
        self.client.close()
        self.live.stop()
        self.store.close()


@pytest.fixture
def serve(services: Services, tmp_path: Path) -> Iterator[Callable[..., ResponseServer]]:
    """Starts a server with a store in the test's directory."""
    servers: list[ResponseServer] = []

    def start(*, in_memory: bool = False, retention_days: float = 30.0) -> ResponseServer:
        directory = None if in_memory else tmp_path
        servers.append(ResponseServer(services, directory, retention_days))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def server(serve: Callable[..., ResponseServer]) -> ResponseServer:
    return serve()


@pytest.fixture
def client(server: ResponseServer) -> openai.OpenAI:
    return server.client
