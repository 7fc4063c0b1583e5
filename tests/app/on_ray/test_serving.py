"""Ray Serve: two replicas answer, and one that is killed is replaced while the other answers."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from sapwood.app.on_ray import library
from sapwood.app.on_ray.serving import serve_ray
from sapwood.base.errors import ConfigError

LIMIT_S = 200.0


def test_without_ray_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "import_module", _missing)
    with pytest.raises(ConfigError, match=r"pip install 'sapwood\[ray\]'"):
        serve_ray("m")


def _missing(name: str) -> Any:
    raise ModuleNotFoundError(name)


def _engines() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "sapwood.app.building.engine_process" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def url(tiny_llama: Path) -> Iterator[str]:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'sapwood[ray]'")
    from ray import serve

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        application = serve_ray(
            str(tiny_llama),
            min_replicas=2,
            load_format="dummy",
            dtype="float32",
            max_total_tokens=2048,
        )
        serve.run(application, name="sapwood", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_two_replicas_answer_and_one_is_replaced(url: str) -> None:
    body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
    with httpx.Client(base_url=url, timeout=60) as client:
        first = client.post("/generate", json=body).raise_for_status().json()
        assert len(first["output_ids"]) == 4
        chat = {"model": "default", "messages": [{"role": "user", "content": "Hi"}]}
        streamed = client.post(
            "/v1/chat/completions", json=chat | {"stream": True, "max_tokens": 3}
        )
        assert streamed.text.rstrip().endswith("data: [DONE]")
        assert client.post("/generate", json={"text": 1}).status_code == 400
        engines = _engines()
        assert len(engines) == 2
        replica = engines[0].parent()
        assert replica is not None
        os.kill(replica.pid, signal.SIGKILL)
        end, num_failed = time.monotonic() + LIMIT_S, 0
        while True:
            try:
                answer = client.post("/generate", json=body)
                failed = answer.status_code != 200
            except httpx.HTTPError:
                failed = True
            num_failed += failed
            if not failed:
                assert answer.json()["output_ids"] == first["output_ids"]
            alive = _engines()
            if len(alive) == 2 and engines[0].pid not in {one.pid for one in alive} and not failed:
                break
            assert time.monotonic() < end
            time.sleep(0.2)
        # What was in flight may be lost; the other replica answers the rest.
        assert num_failed <= 5
