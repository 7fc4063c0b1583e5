"""A real server of S3's protocol, with keys that it checks: s3rver from npm."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clients.environments import ROOT
from tests.history.servers import own_directory, running

HOME = ROOT / "build" / "s3rver"
VERSION = "3.7.1"
KEY = "S3RVER"
"""Both of its keys, unless it is told others."""


@contextmanager
def s3_server(bucket: str = "pages") -> Iterator[dict[str, str]]:
    """The settings of a bucket that nobody else uses."""
    program = _program()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with own_directory() as directory:
        own = ["-a", "127.0.0.1", "-p", str(port), "--no-vhost-buckets", "-s"]
        args = ["node", str(program), "-d", str(directory), *own, "--configure-bucket", bucket]

        def listens() -> bool:
            with socket.socket() as one:
                return one.connect_ex(("127.0.0.1", port)) == 0

        with running(args, listens):
            yield {
                "bucket": bucket,
                "endpoint_url": f"http://127.0.0.1:{port}",
                "access_key_id": KEY,
                "secret_access_key": KEY,
            }


def _program() -> Path:
    program = HOME / "node_modules" / "s3rver" / "bin" / "s3rver.js"
    if not program.exists():
        if shutil.which("npm") is None:
            pytest.skip("there is no npm on the path, which brings s3rver")
        npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(HOME)]
        done = subprocess.run([*npm, f"s3rver@{VERSION}"], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("npm reaches no registry, which brings s3rver")
    return program
