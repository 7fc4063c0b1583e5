from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest


@pytest.fixture
def json_lines() -> Callable[[str], list[dict[str, Any]]]:
    """The objects of a stream, one a line."""

    def read(text: str) -> list[dict[str, Any]]:
        assert text.endswith("\n")
        return [orjson.loads(one) for one in text.removesuffix("\n").split("\n")]

    return read
