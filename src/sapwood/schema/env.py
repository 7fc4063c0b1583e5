"""The only place that reads the process's environment."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


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
