from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest


@pytest.fixture
def named_events() -> Callable[[str], list[dict[str, Any]]]:
    """The events of a stream; each must have the name that its data has."""

    def read(text: str) -> list[dict[str, Any]]:
        assert text.endswith("\n\n")
        found = []
        for part in text.removesuffix("\n\n").split("\n\n"):
            name, data = part.split("\n")
            content = orjson.loads(data.removeprefix("data: "))
            assert name == f"event: {content['type']}"
            found.append(content)
        return found

    return read
