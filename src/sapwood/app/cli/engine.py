"""Fetches the model and opens the engine for commands that run one in this process."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.model import ModelConfig
from sapwood.schema.env import environment, home

if TYPE_CHECKING:
    from sapwood.app.cli.options import Asked
    from sapwood.app.offline.llm import LLM
    from sapwood.store import ModelFiles
    from sapwood.store.terminal import TerminalProgress


def bar() -> TerminalProgress:
    """A progress bar on stderr, for work that takes long."""
    from rich.console import Console

    from sapwood.store.terminal import TerminalProgress

    return TerminalProgress(Console(stderr=True))


def engine_of(asked: Asked) -> EngineConfig:
    """The engine's configuration, in which the default model has its own name.

    Where nobody names a model, this chooses one and fetches it, with a bar."""
    from sapwood.app.building.default_model import with_named_model

    return with_named_model(asked.engine(), home=home(environment()), progress=bar())


def fetch_with_bar(model: ModelConfig) -> ModelFiles:
    """The model's files, fetched unless they are cached, and verified if the options say so."""
    from sapwood.app.building.model_files import open_model

    return open_model(model, home=home(environment()), progress=bar())


def open_llm(config: EngineConfig) -> LLM:
    """An engine in this process."""
    fetch_with_bar(config.model)  # first, because this takes long and has a bar
    from sapwood.app.offline.llm import LLM

    # The files have just been verified, with a bar.
    return LLM(config=replace(config, model=replace(config.model, model_checksum=None)))
