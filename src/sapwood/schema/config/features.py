"""Which options go together with which models."""

from __future__ import annotations

from sapwood.base.errors import ConfigError
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.facts import ModelFacts
from sapwood.schema.config.speculation import SpeculationConfig


def check_speculation(asked: SpeculationConfig, model: ModelFacts) -> None:
    """ConfigError if the model cannot have its tokens guessed."""
    algorithm = asked.speculative_algorithm
    if algorithm is None:
        return
    if model.whole_prompts:
        raise ConfigError(
            f"--speculative-algorithm {algorithm} guesses output tokens, but {model.name} is an "
            "encoder, which has none; leave it out"
        )


def check_adapters(asked: EngineConfig, model: ModelFacts) -> None:
    """ConfigError if the model cannot have the adapters that were asked for."""
    if not asked.lora.is_on:
        return
    if model.makes_numbers:
        raise ConfigError(
            f"{model.name} makes embeddings or scores; LoRA adapters are served with models that "
            "generate. Merge the adapter into the model, or leave out --enable-lora"
        )
    if asked.model.model_impl == "transformers":
        raise ConfigError(
            f"{model.name} is computed by the transformers library, whose layers have no place for "
            "LoRA adapters. Merge the adapter into the model, or leave out --enable-lora"
        )
