from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sapwood.store import ModelFiles
from tests.e2e.server import Server, serving
from tests.tiny import save_qwen3, write_llama


@pytest.fixture(scope="session")
def server(smollm2_files: ModelFiles) -> Iterator[Server]:
    """SmolLM2 in bf16 with a small pool, shared by the tests that leave it as it was."""
    with serving("--model", smollm2_files.name, "--max-total-tokens", "32768") as one:
        yield one


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model without weights (--load-format dummy), with a context that takes it many
    seconds to fill."""
    directory = tmp_path_factory.mktemp("models") / "long"
    return write_llama(directory, max_position_embeddings=8192)


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny random model that transformers has saved."""
    return save_qwen3(tmp_path_factory.mktemp("models") / "tiny-qwen3")


@pytest.fixture(scope="session")
def qwen3_server(qwen3: Path) -> Iterator[Server]:
    """That model in fp32, shared by the tests that leave it as it was."""
    with serving("--model", str(qwen3), "--dtype", "float32") as one:
        yield one
