"""Ray, if it is installed."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from sapwood.base.errors import ConfigError, StartupError


def load(name: str = "ray") -> Any:
    """Ray's module of that name; ConfigError with the way to get it if it is not there."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"this needs {name}, which cannot be imported ({error}); run pip install 'sapwood[ray]'"
        ) from error


def join_cluster(address: str | None, *, shows_logs: bool = False) -> Any:
    """Ray, connected: to the cluster at that address, or for None to a new one on this machine.

    shows_logs  whether this process prints what those on the cluster print
    Raises      StartupError if the cluster cannot be reached"""
    ray = load()
    if ray.is_initialized():
        return ray
    try:
        with _own_sigterm():
            ray.init(
                address="local" if address is None else address,
                include_dashboard=False if address is None else None,
                log_to_driver=shows_logs,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address is None:
            raise StartupError(f"Ray cannot start a cluster on this machine: {error}") from error
        raise StartupError(
            f"the Ray cluster at {address} cannot be joined: {error}; --ray-address names the "
            "host:port of a running one, of which this machine is a node"
        ) from error
    return ray


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Within, Ray makes SIGTERM end this process at once, with status 0 instead of its own; after
    it the handler from before is back, which may have requests to finish."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Ray leaves the signal alone
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        sys.exit(0)
    finally:
        signal.signal(signal.SIGTERM, before)
