"""LMCache's own server if its package is installed, else one that speaks the same messages."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from socket import create_connection, create_server, socket

from sapwood.memory.storage.lmcache import ASKED, TOLD, Command

IS_INSTALLED = importlib.util.find_spec("lmcache") is not None


@contextmanager
def lmcache_server() -> Iterator[str]:
    """Its url."""
    if IS_INSTALLED:
        with _real_server() as port:
            yield f"lm://127.0.0.1:{port}"
        return
    with closing(create_server(("127.0.0.1", 0))) as server:
        known: dict[bytes, tuple[tuple[int, ...], bytes]] = {}
        open_ones: list[socket] = []
        threading.Thread(target=_serve, args=(server, known, open_ones), daemon=True).start()
        yield f"lm://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(2)
        for one in open_ones:
            with suppress(OSError):
                one.shutdown(2)


@contextmanager
def _real_server() -> Iterator[int]:
    with closing(create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < until
                assert process.poll() is None
                time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


def _serve(
    server: socket, known: dict[bytes, tuple[tuple[int, ...], bytes]], open_ones: list[socket]
) -> None:
    with suppress(OSError):
        while True:
            connection, _ = server.accept()
            open_ones.append(connection)
            threading.Thread(target=_talk, args=(connection, known), daemon=True).start()


def _talk(connection: socket, known: dict[bytes, tuple[tuple[int, ...], bytes]]) -> None:
    with suppress(OSError), connection, connection.makefile("rwb") as stream:
        while len(asked := stream.read(ASKED.size)) == ASKED.size:
            command, num_bytes, form, dtype, place, *sizes, key = ASKED.unpack(asked)
            if command == Command.PUT:
                known[key] = (form, dtype, *sizes, place), stream.read(num_bytes)
                continue
            facts, value = known.get(key, ((1, 2, 0, 0, 0, 0, 0), b""))
            status = 200 if command == Command.HEALTH or key in known else 400
            sent = value if command == Command.GET else b""
            stream.write(TOLD.pack(status, len(sent), *facts) + sent)
            stream.flush()
