"""The model's files and the engine, as the commands that run one in this process get them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.model import ModelConfig
from sapwood.schema.env import environment, home

if TYPE_CHECKING:
    from sapwood.app.llm import LLM
    from sapwood.models.store import ModelFiles


def fetch_with_bar(model: ModelConfig) -> ModelFiles:
    """The files of the model, fetched unless they are cached; the bar goes to stderr."""
    from rich.console import Console

    from sapwood.models.store import fetch_model
    from sapwood.models.store.terminal import TerminalProgress

    return fetch_model(
        model.model,
        home=home(environment()),
        revision=model.revision,
        load_format=model.load_format,
        offline=model.offline,
        progress=TerminalProgress(Console(stderr=True)),
    )


def open_llm(config: EngineConfig) -> LLM:
    """An engine in this process."""
    fetch_with_bar(config.model)  # first, because this takes long and has a bar
    from sapwood.app.llm import LLM

    return LLM(config=config)
