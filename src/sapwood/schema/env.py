"""The only place that reads the process's environment."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sapwood.base.errors import ConfigError


def environment() -> Mapping[str, str]:
    return os.environ


def hicache_directory(env: Mapping[str, str]) -> Path:
    """Where pages of KV are kept as files: $SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR, else a folder
    among the temporary files."""
    given = env.get("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR")
    return Path(given).expanduser() if given else Path(tempfile.gettempdir()) / "hicache"


def home(env: Mapping[str, str]) -> Path:
    """Where models are cached: $SAPWOOD_HOME, else ~/.cache/sapwood."""
    given = env.get("SAPWOOD_HOME")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "sapwood"


def handover_wait_s(env: Mapping[str, str]) -> float:
    """How long a prompt that was read waits for the engine that answers it:
    $SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT, else 300 seconds."""
    return _seconds(env, "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT")


def pages_wait_s(env: Mapping[str, str]) -> float:
    """How long a request waits for the pages of its prompt:
    $SGLANG_DISAGGREGATION_WAITING_TIMEOUT, else 300 seconds."""
    return _seconds(env, "SGLANG_DISAGGREGATION_WAITING_TIMEOUT")


def _seconds(env: Mapping[str, str], name: str) -> float:
    """ConfigError if it is no such time."""
    given = env.get(name) or "300"
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 1e6:
        raise ConfigError(f"{name} is {given[:40]!r} but must be a number of seconds above 0")
    return seconds
