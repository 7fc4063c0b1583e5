"""Real PostgreSQL and Redis servers, each on a socket in a directory of its own.

Debian has both: `apt-get install postgresql redis-server`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_LIMIT_S = 60.0


@contextmanager
def redis_server() -> Iterator[str]:
    """The address of a Redis that nobody else uses."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("there is no redis-server on this machine")
    with own_directory() as directory:
        socket = directory / "redis.sock"
        args = [program, "--port", "0", "--unixsocket", str(socket), "--save", ""]
        with running([*args, "--dir", str(directory)], socket.exists):
            yield f"unix://{socket}"


@contextmanager
def postgres_server() -> Iterator[str]:
    """The address of a PostgreSQL that nobody else uses."""
    found = shutil.which("initdb") or next(
        (str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None
    )
    if found is None:
        pytest.skip("there is no PostgreSQL on this machine")
    programs = Path(found).resolve().parent
    # The server refuses to run as root.
    user = "nobody" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
    with own_directory() as directory:
        shutil.chown(directory, user)
        data = directory / "data"
        init = [str(programs / "initdb"), "-D", str(data), "-U", "sapwood", "-A", "trust", "-N"]
        subprocess.run(init, user=user, check=True, capture_output=True, cwd=directory)
        args = [str(programs / "postgres"), "-D", str(data), "-k", str(directory), "-h", ""]
        ready = [str(programs / "pg_isready"), "-q", "-h", str(directory)]
        with running(
            [*args, "-F"], lambda: subprocess.run(ready, check=False).returncode == 0, user=user
        ):
            yield f"postgresql://sapwood@/postgres?host={directory}"


@contextmanager
def own_directory() -> Iterator[Path]:
    """A short path: the name of a socket has at most 107 characters."""
    path = Path(tempfile.mkdtemp(prefix="sapwood-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def running(
    args: list[str], is_ready: Callable[[], bool], user: str | None = None
) -> Iterator[None]:
    process = subprocess.Popen(
        args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, user=user, cwd="/"
    )
    try:
        deadline = time.monotonic() + _LIMIT_S
        while not is_ready():
            assert process.poll() is None, f"{args[0]} has ended"
            assert time.monotonic() < deadline, f"{args[0]} does not become ready"
            time.sleep(0.01)
        yield
    finally:
        process.send_signal(signal.SIGINT)  # PostgreSQL would wait for its clients at SIGTERM
        process.wait()
