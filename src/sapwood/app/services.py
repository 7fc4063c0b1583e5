"""The API side of one engine: tokenizer, template, generator. Torch-free, so it starts fast."""

from __future__ import annotations

import dataclasses
import time
from importlib.metadata import version
from pathlib import Path

from sapwood.app.model_defaults import read_json_if_there, sampling_defaults
from sapwood.frontends.common.services import Services
from sapwood.models.store import ModelFiles
from sapwood.schema.client import EngineClient
from sapwood.schema.config.engine import EngineConfig
from sapwood.text.generation import TextGenerator
from sapwood.text.template import ChatTemplate
from sapwood.text.tokenizer import Tokenizer


def build_services(engine: EngineClient, files: ModelFiles, config: EngineConfig) -> Services:
    """What the HTTP dialects and the Python API answer with."""
    tokenizer_path = Path(config.model.tokenizer_path or files.path)
    tokenizer = Tokenizer.from_directory(tokenizer_path)
    model = read_json_if_there(files.path / "config.json")
    return Services(
        engine=engine,
        generator=TextGenerator(engine, tokenizer, vocab_size=model.get("vocab_size")),
        tokenizer=tokenizer,
        template=ChatTemplate.of_model(tokenizer, override=config.model.chat_template),
        model_name=config.model.served_model_name or config.model.model,
        model_path=config.model.model,
        tokenizer_path=str(tokenizer_path),
        model_type=model.get("model_type"),
        architectures=tuple(model.get("architectures") or ()),
        created=int(time.time()),
        version=version("sapwood"),
        default_sampling=sampling_defaults(files.path),
        options=_flat(config),
    )


def _flat(config: EngineConfig) -> dict[str, object]:
    parts = dataclasses.asdict(config).values()
    return {name: value for part in parts for name, value in part.items()}
