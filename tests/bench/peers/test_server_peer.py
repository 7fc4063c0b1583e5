import sys
import textwrap

import pytest

from sapwood.base.errors import ConfigError, EngineUnavailable
from sapwood.bench.http_stream import HttpError
from sapwood.bench.offline import Generated
from sapwood.bench.peers.interface import PeerSetup
from sapwood.bench.peers.server_peer import open_server

SERVER = textwrap.dedent("""
    import json, sys
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert self.path == "/v1/completions" and asked["model"] == sys.argv[2]
            assert asked["ignore_eos"] and asked["temperature"] == 0 and asked["stream"]
            status = 400 if asked["prompt"] == [9] else 200
            self.send_response(status)
            self.end_headers()
            if status == 400:
                self.wfile.write(b'{"error": {"message": "no nines"}}')
                return
            count = asked["max_tokens"]
            for _ in range(count):
                self.event({"choices": [{"text": "x"}]})
            details = {"cached_tokens": len(asked["prompt"]) - 1}
            usage = {"completion_tokens": count, "prompt_tokens_details": details}
            self.event({"choices": [], "usage": usage if len(asked["prompt"]) != 2 else None})
            self.wfile.write(b"data: [DONE]\\n\\n")

        def event(self, value):
            self.wfile.write(b"data: " + json.dumps(value).encode() + b"\\n\\n")

        def log_message(self, *_):
            pass

    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
""")


def setup(*words, **options):
    command = [sys.executable, "-c", *words]
    return PeerSetup(
        model_dir="m", dtype="float32", num_threads=1, options={"command": command, **options}
    )


def test_requests_are_sent_at_once_and_their_usage_read():
    with open_server(setup(SERVER, "{port}", "{model}", served_model="m")) as server:
        assert server.generate([[1, 2, 3], [4, 5, 6, 7]], [5, 6]) == [
            Generated(num_output_tokens=5, num_cached_tokens=2),
            Generated(num_output_tokens=6, num_cached_tokens=3),
        ]
        with pytest.raises(HttpError, match="HTTP 400: no nines"):
            server.generate([[9]], [1])
        with pytest.raises(HttpError, match="how many tokens"):
            server.generate([[1, 2]], [1])


def test_a_server_that_ends_is_reported():
    with pytest.raises(EngineUnavailable, match="ended with 3"), open_server(setup("exit(3)")):
        pass


def test_a_server_needs_a_command():
    bare = PeerSetup(model_dir="m", dtype="float32", num_threads=1, options={"served_model": "m"})
    with pytest.raises(ConfigError, match="command"), open_server(bare):
        pass
    with pytest.raises(ConfigError, match="command"), open_server(setup("exit(3)", speed=9)):
        pass
