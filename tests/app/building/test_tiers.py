"""What a storage behind the host tier asks of the engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sapwood.app.building.tiers import _opened
from sapwood.base.errors import ConfigError


def resolved(device: str, page_size: int) -> Any:
    memory = SimpleNamespace(page_size=page_size)
    return SimpleNamespace(device=torch.device(device), config=SimpleNamespace(memory=memory))


def test_small_pages_are_not_stored() -> None:
    with pytest.raises(ConfigError, match="take at least"):
        _opened(resolved("cpu", 1), 0, "file", {})
