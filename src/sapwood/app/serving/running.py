"""The sapwood servers of this user on this machine, found among the processes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath

import httpx
import psutil

TIMEOUT_S = 2.0
"""A server that does not answer within this time is listed without what it would have said."""
_THROUGHPUT = "sapwood:gen_throughput"
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """A server.

    url           where it listens; None: it does not yet
    model         the name of its model; None: it does not say
    memory_bytes  resident memory of all its processes; memory that they share counts once where
                  the system tells
    tokens_per_s  output tokens per second now; None: it does not say
    started_s     seconds since 1970
    """

    pid: int
    url: str | None
    model: str | None
    memory_bytes: int
    tokens_per_s: float | None
    started_s: float


def running_servers() -> list[RunningServer]:
    """The servers that this user may look at, the oldest first."""
    processes: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with _gone():
            if is_server(process.cmdline()):
                processes[process.pid] = process
    for process in list(processes.values()):
        with _gone():  # a shell or a timeout has the server's command line too
            processes.pop(process.ppid(), None)
    found: list[RunningServer] = []
    for process in processes.values():
        with _gone():
            found.append(_server(process))
    return sorted(found, key=lambda server: server.started_s)


def served_model(url: str, *, api_key: str | None) -> str | None:
    """The name of the model that a server has; None if no server with OpenAI's API answers."""
    answer = _get(f"{url}/v1/models", {} if api_key is None else {"x-api-key": api_key})
    try:
        return None if answer is None else str(answer.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        return None


def is_server(command: Sequence[str]) -> bool:
    """Whether a command line is that of `sapwood serve`."""
    words = [PurePath(word).name for word in command[:4]]
    return any(
        word in ("sapwood", "sapwood.exe") and following == "serve"
        for word, following in pairwise(words)
    )


def throughput_of(metrics: str) -> float | None:
    """Output tokens per second of all replicas, out of the text of /metrics."""
    lines = [line for line in metrics.splitlines() if line.startswith(_THROUGHPUT)]
    return sum(float(line.rpartition(" ")[2]) for line in lines) if lines else None


def _gone() -> contextlib.suppress:
    """For a process that has ended meanwhile, or is another user's."""
    return contextlib.suppress(psutil.Error)


def _server(process: psutil.Process) -> RunningServer:
    url = _url(process)
    return RunningServer(
        pid=process.pid,
        url=url,
        model=None if url is None else served_model(url, api_key=None),
        memory_bytes=sum(_memory(each) for each in (process, *process.children(recursive=True))),
        tokens_per_s=None if url is None else _tokens_per_s(url),
        started_s=process.create_time(),
    )


def _url(process: psutil.Process) -> str | None:
    listening = [
        connection.laddr
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    if not listening:
        return None
    address = min(listening, key=lambda each: each.port)
    host = _ANY_ADDRESS.get(address.ip, f"[{address.ip}]" if ":" in address.ip else address.ip)
    scheme = (
        "https" if any(word.startswith("--ssl-certfile") for word in process.cmdline()) else "http"
    )
    return f"{scheme}://{host}:{address.port}"


def _memory(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        full = process.memory_full_info()
        return int(getattr(full, "pss", full.rss))
    return 0


def _tokens_per_s(url: str) -> float | None:
    answer = _get(f"{url}/metrics", {})
    return None if answer is None else throughput_of(answer.text)


def _get(url: str, headers: Mapping[str, str]) -> httpx.Response | None:
    """The answer of a server on this machine, for which no proxy is used; None if it has none."""
    try:
        # A certificate is made for the server's public name, not for an address of this machine.
        answer = httpx.get(url, headers=headers, timeout=TIMEOUT_S, trust_env=False, verify=False)
        return answer.raise_for_status()
    except httpx.HTTPError:
        return None
