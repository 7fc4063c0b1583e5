"""The only place that reads the process's environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def environment() -> Mapping[str, str]:
    return os.environ


def home(env: Mapping[str, str]) -> Path:
    """Where models are cached: $SAPWOOD_HOME, else ~/.cache/sapwood."""
    given = env.get("SAPWOOD_HOME")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "sapwood"
