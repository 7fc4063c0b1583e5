"""`sapwood bench random-model`, after its options are parsed."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from sapwood.base.errors import ConfigError
from sapwood.bench.ops.options import SHAPES
from sapwood.bench.random_model.checkpoint import write_checkpoint
from sapwood.bench.random_model.gguf_file import write_gguf
from sapwood.bench.random_model.options import RandomModelOptions
from sapwood.store import Progress, fetch_model


def make_random_model(
    options: RandomModelOptions, console: Console, *, home: Path, progress: Progress
) -> None:
    """Write the checkpoint and the GGUF file; ConfigError if one of them exists."""
    directory = Path(options.checkpoint).expanduser()
    gguf = None if options.gguf is None else Path(options.gguf).expanduser()
    if gguf is not None and gguf.exists():
        raise ConfigError(f"{gguf} exists already; remove it, or name another file")
    files = fetch_model(options.tokenizer, home=home, offline=options.offline, progress=progress)
    num_weights = write_checkpoint(
        SHAPES[options.shape],
        options.num_layers,
        directory,
        tokenizer=files.path,
        dtype=options.dtype,
        seed=options.seed,
    )
    console.print(
        f"{directory}: {num_weights / 1e6:,.0f} M random weights", markup=False, soft_wrap=True
    )
    if gguf is not None:
        write_gguf(directory, gguf)
        console.print(f"{gguf}: the same as GGUF", markup=False, soft_wrap=True)
