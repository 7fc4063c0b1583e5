"""sapwood as a peer, through its Python API; its options are the engine's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sapwood.bench.offline import TokenGenerator
from sapwood.bench.peers.interface import PeerSetup
from sapwood.bench.sapwood_generator import open_llm
from sapwood.schema.config.engine import COMPONENTS, EngineConfig
from sapwood.schema.config.options import gather


@contextmanager
def open_sapwood(setup: PeerSetup) -> Iterator[TokenGenerator]:
    """Open an engine; ConfigError for an option that the engine does not have."""
    common = {
        "model": setup.model_dir,
        "dtype": setup.dtype,
        "num_threads": setup.num_threads,
        "offline": True,
    }
    options = {**common, **setup.options}
    values = gather(COMPONENTS, flags={}, env={}, file=options, file_name="the peer's options")
    with open_llm(EngineConfig.of(values)) as generator:
        yield generator
