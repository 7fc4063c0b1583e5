"""Renders the chart with helm itself, which comes from PyPI with the other tools of the tests."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

HELM = Path(sys.executable).parent / "helm"


class RenderError(Exception):
    """The chart refuses these values."""


def rendered(chart: Path, values: Mapping[str, Any], *, release: str) -> list[dict[str, Any]]:
    """All objects of the chart in the namespace "models"; `values` are laid over values.yaml."""
    return yaml.safe_load(_rendered(chart, json.dumps(values), release))


@functools.cache
def _rendered(chart: Path, values: str, release: str) -> str:
    """A YAML list of the objects: what the caller gets is a copy of its own."""
    text = helm(
        "template", release, str(chart), "--namespace", "models", "--values", "-", given=values
    )
    return yaml.safe_dump([one for one in yaml.safe_load_all(text) if one is not None])


def helm(*arguments: str, given: str = "") -> str:
    """What helm prints; RenderError if it fails. Skips where there is no helm for the machine."""
    if not HELM.exists():
        pytest.skip("there is no helm beside this Python (helm-binary)")
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [str(HELM), *arguments],
            input=given,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HELM_CACHE_HOME": home, "HELM_CONFIG_HOME": home},
        )
    if done.returncode != 0:
        raise RenderError(done.stderr or done.stdout)
    return done.stdout
