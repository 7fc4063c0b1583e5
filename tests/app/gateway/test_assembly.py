"""`sapwood gateway` as a process, in an environment that has only what the gateway needs."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.gateway.plain.plain_stub import write_tokenizer

ROOT = Path(__file__).parents[3]

# Ends with "an import that is refused" if the gateway needs another package.
_PROGRAM = """
import sys
from importlib.abc import MetaPathFinder

class Refuses(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(name + " is not among what the gateway needs")

sys.meta_path.insert(0, Refuses())
from sapwood.app.cli.main import main
sys.exit(main({args}))
"""
_IMPORT_NAMES = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub"}


def names(requirements: list[str]) -> set[str]:
    """The packages of a list of requirements, as they are imported."""
    found = {re.split(r"[^\w.-]", text)[0].lower() for text in requirements}
    return {_IMPORT_NAMES.get(name, name.replace("-", "_")) for name in found}


def blocked() -> set[str]:
    """What sapwood depends on and the gateway does not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    every = names(project["project"]["dependencies"])
    needed = names(project["dependency-groups"]["gateway"])
    assert needed <= every
    assert "torch" in every - needed
    # Packages of the group bring these along, if they are there.
    return every - needed - {"python_multipart"} | {"triton", "tokenizers"}


@contextmanager
def gateway(*args: str, and_also: frozenset[str] = frozenset()) -> Iterator[subprocess.Popen[str]]:
    """and_also: packages that are there besides what a gateway needs"""
    program = _PROGRAM.format(blocked=blocked() - and_also, args=["gateway", *args])
    process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """What the pattern's group finds in the process's log."""
    assert process.stderr is not None
    log = ""
    for line in process.stderr:
        log += line
        if found := re.search(pattern, line):
            return found[1]
    raise AssertionError(f"{pattern} is not in the log:\n{log}")


def test_the_gateway_starts_serves_and_ends_without_torch() -> None:
    args = ("--port", "0", "--prometheus-port", "0")
    with gateway("http://127.0.0.1:9", *args) as process:
        url = read_until(process, r"the gateway is at (\S+);")
        metrics_url = read_until(process, r"metrics are at (\S+)")
        with httpx.Client(trust_env=False) as client:
            (worker,) = client.get(f"{url}/workers").json()["workers"]
            assert worker["url"] == "http://127.0.0.1:9"
            assert client.get(f"{url}/liveness").status_code == 200
            told = client.get(metrics_url)
            assert 'smg_worker_health{worker="http://127.0.0.1:9"} 0.0' in told.text
            assert client.get(metrics_url + "/else").status_code == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0


def test_chats_are_made_without_torch_and_transformers(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "m")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    more = frozenset(names(project["dependency-groups"]["gateway-tokenizers"]))
    args = (
        "--disable-retries",
        "--port",
        "0",
        "--prometheus-port",
        "-1",
        "--model-path",
        str(tmp_path / "m"),
    )
    with gateway(
        "http://127.0.0.1:9", *args, "--tool-call-parser", "auto", and_also=more
    ) as process:
        url = read_until(process, r"the gateway is at (\S+);")
        with httpx.Client(trust_env=False) as client:
            told = client.post(f"{url}/v1/tokenize", json={"prompt": "Hello"})
            assert told.json()["char_count"] == 5
            messages = [{"role": "user", "content": "Hello"}]
            body = {"messages": messages}
            nobody = client.post(f"{url}/v1/chat/completions", json=body, timeout=30)
            assert nobody.status_code == 503
            assert "no worker can take the request" in nobody.json()["message"]
    with gateway(*args) as process:
        _, log = process.communicate()
        assert process.returncode == 1
        assert "pip install tokenizers jinja2" in log


@pytest.mark.parametrize("args", [("nowhere",), ("--policy", "best"), ("--cache-threshold", "2")])
def test_options_that_cannot_be_meant_end_it(args: tuple[str, ...]) -> None:
    with gateway(*args, "--port", "0", "--prometheus-port", "0") as process:
        _, log = process.communicate()
        assert process.returncode in (1, 2)
        assert args[-1] in log
        assert "Traceback" not in log
