"""A server that is started for the comparison and asked over OpenAI's completions API.

Options: `command`, a list of words in which {model}, {port} and {num_threads} are filled in, and
`served_model`, the name to send (default: "default"). It is measured with its HTTP and streaming.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from sapwood.base.errors import ConfigError, EngineUnavailable
from sapwood.bench.dialects import Asked, Completions, Usage
from sapwood.bench.http_stream import (
    Endpoint,
    HttpError,
    ResponseParser,
    SseParser,
    exchange,
    status_message,
)
from sapwood.bench.offline import Generated, TokenGenerator
from sapwood.bench.peers.interface import PeerSetup
from sapwood.bench.workloads.workload import BenchRequest

START_TIMEOUT_S = 600.0
ANSWER_TIMEOUT_S = 3600.0
END_TIMEOUT_S = 20.0
RETRY_S = 0.05

T = TypeVar("T")


@contextmanager
def open_server(setup: PeerSetup) -> Iterator[TokenGenerator]:
    """Start a server. ConfigError without a command, EngineUnavailable if it never answers."""
    options = dict(setup.options)
    command = options.pop("command", None)
    served_model = options.pop("served_model", "default")
    if not isinstance(command, list) or not command or options:
        raise ConfigError("a server peer takes the options command (a list) and served_model")
    port = _free_port()
    facts = {"model": setup.model_dir, "port": port, "num_threads": setup.num_threads}
    words = [_filled(str(word), facts) for word in command]
    process = subprocess.Popen(words, stdout=sys.stderr, stdin=subprocess.DEVNULL)
    try:
        generator = ServerGenerator(Endpoint.parse(f"http://127.0.0.1:{port}"), str(served_model))
        _wait(process, generator, words)
        yield generator
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class ServerGenerator:
    """Sends all requests of a call at once, each as its own stream: greedy, of exact lengths."""

    def __init__(self, endpoint: Endpoint, served_model: str) -> None:
        self._endpoint = endpoint
        self._asked = Asked(model=served_model, temperature=0.0, ignore_eos=True, extra={})

    def generate(
        self, prompts: Sequence[Sequence[int]], output_lengths: Sequence[int]
    ) -> list[Generated]:
        """The outputs of all prompts; HttpError if a request fails."""

        async def all_at_once() -> list[Generated]:
            pairs = zip(prompts, output_lengths, strict=True)
            return await asyncio.gather(*(self._one(list(prompt), n) for prompt, n in pairs))

        return _run(all_at_once())

    async def _one(self, prompt: list[int], num_output_tokens: int) -> Generated:
        dialect = Completions()
        request = BenchRequest(
            prompt=tuple(prompt),
            num_prompt_tokens=len(prompt),
            num_output_tokens=num_output_tokens,
        )
        events, refused = SseParser(), bytearray()
        usage = Usage()

        def on_body(parser: ResponseParser, data: bytes) -> None:
            nonlocal usage
            if parser.status != 200:
                refused.extend(data)
                return
            for payload in events.feed(data):
                if payload != b"[DONE]":
                    usage = dialect.read(payload).usage or usage

        answer = await exchange(
            self._endpoint,
            "POST",
            dialect.path,
            body=json.dumps(dialect.body(request, self._asked)).encode(),
            headers={},
            on_body=on_body,
            timeout_s=ANSWER_TIMEOUT_S,
        )
        if answer.status != 200:
            raise HttpError(status_message(answer.status, bytes(refused)))
        if usage.num_output_tokens is None:
            raise HttpError("the server does not say how many tokens it put out")
        return Generated(
            num_output_tokens=usage.num_output_tokens,
            num_cached_tokens=usage.num_cached_tokens or 0,
        )


def _wait(process: subprocess.Popen[bytes], server: ServerGenerator, words: list[str]) -> None:
    """Wait until the server answers a request."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        if process.poll() is not None:
            raise EngineUnavailable(f"{words[0]} ended with {process.returncode} before it served")
        try:
            server.generate([[1, 2, 3, 4]], [1])
            return
        except HttpError as error:
            if time.monotonic() > deadline_s:
                raise EngineUnavailable(f"{words[0]} does not answer: {error}") from error
            time.sleep(RETRY_S)


def _filled(word: str, facts: Mapping[str, object]) -> str:
    """The command's words with their placeholders filled in; other braces stay, as in JSON."""
    for name, value in facts.items():
        word = word.replace("{" + name + "}", str(value))
    return word


def _run(work: Coroutine[Any, Any, T]) -> T:
    import uvloop

    return uvloop.run(work)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
