from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from sapwood.app.serving.running import is_server, running_servers, served_model, throughput_of

SERVER = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        said = {
            "/v1/models": '{"data": [{"id": "tiny"}]}',
            "/metrics": 'sapwood:gen_throughput{model="tiny"} 12.5',
        }
        body = said[self.path].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """(pid, port) of a process whose command line is that of a server."""
    script = tmp_path / "sapwood"
    script.write_text(SERVER)
    command = [sys.executable, str(script), "serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        yield started.pid, int(started.stdout.readline())
        started.kill()


def test_a_server_is_found_with_what_it_says(process: tuple[int, int]) -> None:
    pid, port = process
    (found,) = (server for server in running_servers() if server.pid == pid)
    assert found.url == f"http://127.0.0.1:{port}"
    assert found.model == "tiny"
    assert found.tokens_per_s == 12.5
    assert found.memory_bytes > 2**20


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (["/venv/bin/sapwood", "serve"], True),
        (["/usr/bin/python3", "/venv/bin/sapwood", "serve", "--port", "1"], True),
        (["python", "-m", "sapwood", "serve"], True),
        (["/venv/bin/sapwood", "chat", "serve"], False),
        (["grep", "serve", "sapwood"], False),
        ([], False),
    ],
)
def test_command_lines_of_servers(command: list[str], found: bool) -> None:
    assert is_server(command) is found


def test_the_throughput_in_metrics() -> None:
    assert throughput_of("# HELP x\nsapwood:gen_throughput 3.5\n") == 3.5
    assert throughput_of("other 1\n") is None


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[str | None]]]:
    """A server with a key, and the keys that it was sent."""
    keys: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers.get("x-api-key"))
            body = json.dumps({"data": [{"id": "tiny"}]} if keys[-1] else {"error": {}}).encode()
            self.send_response(200 if keys[-1] else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", keys
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_with_a_key_is_asked_with_it(endpoint: tuple[str, list[str | None]]) -> None:
    url, keys = endpoint
    assert served_model(url, api_key=None) is None
    assert served_model(url, api_key="sesame") == "tiny"
    assert keys == [None, "sesame"]


def test_where_nobody_listens_there_is_no_model() -> None:
    assert served_model("http://127.0.0.1:9", api_key=None) is None
