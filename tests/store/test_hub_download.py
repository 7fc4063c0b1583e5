"""Hub entries of the catalogue, fetched from a hub of our own by `sapwood pull`, with no other."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sapwood.store import load_catalogue
from sapwood.store.catalogue import HubSpec
from tests.gguf_sample import GgufSample
from tests.tiny import save_qwen3

COMMIT = "c0ffee" * 6 + "c0ff"


@pytest.fixture
def hub() -> Iterator[Callable[[str, Path], str]]:
    """Serves the files of a directory as a repository; returns the hub's address."""
    servers: list[ThreadingHTTPServer] = []

    def start(repository: str, folder: Path) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer()

            def do_GET(self) -> None:
                self._answer()

            def _answer(self) -> None:
                path = self.path.partition("?")[0]
                if path in (
                    f"/api/models/{repository}/revision/main",
                    f"/api/models/{repository}/revision/{COMMIT}",
                ):
                    files = [
                        {"rfilename": file.name, "size": file.stat().st_size}
                        for file in sorted(folder.iterdir())
                    ]
                    about = {"id": repository, "sha": COMMIT, "siblings": files}
                    self._send(200, json.dumps(about).encode())
                    return
                if path == f"/api/models/{repository}/tree/{COMMIT}":
                    rows = [
                        {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"}
                        for file in sorted(folder.iterdir())
                    ]
                    self._send(200, json.dumps(rows).encode())
                    return
                prefix = f"/{repository}/resolve/{COMMIT}/"
                file = folder / path.removeprefix(prefix)
                if path.startswith(prefix) and file.is_file():
                    self._send(200, file.read_bytes())
                else:
                    self._send(404, b"{}")

            def _send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def sapwood(home: Path, address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sapwood", *arguments],
        env={
            **os.environ,
            "SAPWOOD_HOME": str(home),
            "HF_ENDPOINT": address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )


def source_of(name: str) -> HubSpec:
    (source,) = load_catalogue()[name].sources
    assert isinstance(source, HubSpec)
    return source


def test_a_repository_is_pulled_listed_and_removed(tmp_path: Path, hub) -> None:
    model = save_qwen3(tmp_path / "model")
    address = hub(source_of("qwen3-0.6b").repository, model)
    home = tmp_path / "home"
    pulled = sapwood(home, address, "pull", "qwen3-0.6b")
    assert pulled.returncode == 0, pulled.stderr
    assert "1 weight files, safetensors" in pulled.stdout
    (weights,) = home.glob("hub/models--*/snapshots/*/model.safetensors")
    assert weights.read_bytes() == (model / "model.safetensors").read_bytes()
    _, row = sapwood(home, address, "list").stdout.splitlines()
    assert row.startswith("qwen3-0.6b, Qwen/Qwen3-0.6B  ")
    assert row.split()[-3:] == ["F32", "just", "now"]
    assert sapwood(home, address, "rm", "qwen3-0.6b").stdout.startswith("removed qwen3-0.6b, ")
    assert list(home.glob("hub/models--*")) == []
    assert "no models yet" in sapwood(home, address, "list").stderr


def test_one_file_of_a_repository_is_pulled(tmp_path: Path, hub) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    source = source_of("qwen3-4b-q4")
    assert source.file is not None
    GgufSample().write(folder / source.file)
    GgufSample().write(folder / "Qwen3-4B-Q8_0.gguf")
    home = tmp_path / "home"
    pulled = sapwood(home, hub(source.repository, folder), "pull", "qwen3-4b-q4")
    assert pulled.returncode == 0, pulled.stderr
    assert [path.name for path in home.glob("hub/*/snapshots/*/*.gguf")] == [source.file]


def test_a_repository_that_the_hub_does_not_have_is_named(tmp_path: Path, hub) -> None:
    pulled = sapwood(tmp_path / "home", hub("org/other", tmp_path), "pull", "qwen3-0.6b")
    assert pulled.returncode == 1
    assert "Hugging Face repository Qwen/Qwen3-0.6B@main: " in pulled.stderr
    assert "Traceback" not in pulled.stderr
