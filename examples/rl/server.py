"""What a trainer asks of a server: samples, and to take new weights, in each of three ways."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

GROUP = "trainer"
START_LIMIT_S = 300.0
CALL_LIMIT_S = 600.0


class Server:
    """A sapwood server at an address."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def generate(
        self, prompts: Sequence[str], *, samples: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """`samples` answers per prompt; those of the first prompt come first."""
        answers: list[dict[str, Any]] = self.post(
            "/generate",
            {
                "text": list(prompts),
                "sampling_params": {
                    "n": samples,
                    "temperature": 1.0,
                    "max_new_tokens": max_new_tokens,
                    "stop": ["\n"],
                },
            },
        )
        return answers

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer's JSON; RuntimeError with what the server says if it refuses."""
        request = urllib.request.Request(
            self.url + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=CALL_LIMIT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code}: {error.read().decode()}") from error

    def take_from_disk(self, folder: Path, version: str) -> None:
        """Read a whole checkpoint that the trainer has written."""
        self.post(
            "/update_weights_from_disk", {"model_path": str(folder), "weight_version": version}
        )

    def take_tensors(self, tensors: Mapping[str, Tensor], version: str) -> None:
        """Take tensors from the request itself; all others stay as they are."""
        data = base64.b64encode(safetensors.torch.save(dict(tensors))).decode()
        body = {"serialized_named_tensors": [data], "load_format": "safetensors"}
        self.post("/update_weights_from_tensor", {**body, "weight_version": version})


class Group:
    """A process group of the trainer, which is rank 0, and the server, which is rank 1."""

    def __init__(self, server: Server) -> None:
        self._server = server
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        timeout = timedelta(seconds=CALL_LIMIT_S)
        self._meeting = dist.TCPStore("127.0.0.1", port, 2, True, timeout, wait_for_workers=False)
        # The keys that torch.distributed gives to the gloo part of a group of that name.
        store: Any = dist.PrefixStore(GROUP, self._meeting)
        store = dist.PrefixStore("cpu/", dist.PrefixStore(f"{GROUP}/", store))
        body = {
            "master_address": "127.0.0.1", "master_port": port, "rank_offset": 1,
            "world_size": 2, "group_name": GROUP, "backend": "gloo",
        }  # fmt: skip
        with beside(lambda: server.post("/init_weights_update_group", body)):
            self._group = dist.ProcessGroupGloo(store, 0, 2, timeout)

    def send(self, tensors: Mapping[str, Tensor], version: str) -> None:
        """Broadcast tensors, one after the other, in the order in which they are announced."""
        body = {
            "names": list(tensors),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
            "group_name": GROUP,
            "weight_version": version,
        }
        with beside(lambda: self._server.post("/update_weights_from_distributed", body)):
            for tensor in tensors.values():
                self._group.broadcast(tensor.contiguous(), 0).wait()

    def close(self) -> None:
        self._server.post("/destroy_weights_update_group", {"group_name": GROUP})
        del self._group


@contextmanager
def beside(call: Any) -> Iterator[None]:
    """Make a call in a thread while the `with` block runs; its error is raised at the end."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - it is raised at the end
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()
    if failed:
        raise failed[0]


@contextmanager
def serving(model: Path, *flags: str) -> Iterator[Server]:
    """A server of its own process on this machine, until the `with` block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sapwood", "serve", "--model", str(model)]
    process = subprocess.Popen([*command, "--port", str(port), *flags])
    server = Server(f"http://127.0.0.1:{port}")
    try:
        wait_until_ready(server, process)
        yield server
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"the server was not ready after {START_LIMIT_S:g} s")


def in_serving_dtype(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies as a checkpoint in bfloat16 has them."""
    return {name: one.detach().to(torch.bfloat16, copy=True) for name, one in named.items()}
