"""sapwood through its Python API, as the others see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sapwood.bench.offline import TokenGenerator
from sapwood.bench.peers.interface import PeerSetup
from sapwood.bench.sapwood_generator import open_llm
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.execution import ExecutionConfig
from sapwood.schema.config.model import ModelConfig


@contextmanager
def open_sapwood(setup: PeerSetup) -> Iterator[TokenGenerator]:
    config = EngineConfig(
        model=ModelConfig(model=setup.model_dir, dtype=setup.dtype, offline=True),
        execution=ExecutionConfig(num_threads=setup.num_threads),
    )
    with open_llm(config) as generator:
        yield generator
