from __future__ import annotations

from collections.abc import Iterator

import pytest

from sapwood.models.store import ModelFiles
from tests.e2e.server import Server, serving


@pytest.fixture(scope="session")
def server(smollm2_files: ModelFiles) -> Iterator[Server]:
    """SmolLM2 in bf16 with a small pool, shared by the tests that leave it as it was."""
    with serving("--model", smollm2_files.name, "--max-total-tokens", "32768") as one:
        yield one
