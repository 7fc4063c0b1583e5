"""Launches of Triton's kernels, noted by a recorder as a GPU notes them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import pytest

from sapwood.kernels import triton as package
from tests.executor.recording_capture import RecordingCapture

_LAUNCHED = re.compile(r"^\s+(\w+)\[(?:\(|grid\])", re.MULTILINE)


def note_launches(monkeypatch: pytest.MonkeyPatch, recorder: RecordingCapture) -> list[str]:
    """Their names. Functions that kernels call are no launches."""
    found = []
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        for name in sorted({*_LAUNCHED.findall(inspect.getsource(module))}):
            monkeypatch.setattr(module, name, recorder.noted(getattr(module, name)))
            found.append(name)
    return found
