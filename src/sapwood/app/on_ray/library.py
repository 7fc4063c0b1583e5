"""Ray, if it is installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sapwood.base.errors import ConfigError


def load(name: str = "ray") -> Any:
    """Ray's module of that name; ConfigError with the way to get it if it is not there."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"this needs {name}, which cannot be imported ({error}); run pip install 'sapwood[ray]'"
        ) from error


def join_cluster(address: str | None, *, shows_logs: bool = False) -> Any:
    """Ray, connected: to the cluster at that address, or for None to one on this machine.

    shows_logs  whether this process prints what those on the cluster print"""
    ray = load()
    if not ray.is_initialized():
        ray.init(address=address, include_dashboard=False, log_to_driver=shows_logs)
    return ray
