"""Whether a model writes or draws, and which options are for which of them."""

from __future__ import annotations

from pathlib import Path

from sapwood.app.cli.options import Asked
from sapwood.base.errors import ConfigError
from sapwood.schema.config.engine import COMPONENTS
from sapwood.schema.config.model import ModelConfig
from sapwood.schema.config.observability import ObservabilityConfig
from sapwood.schema.config.options import option_specs
from sapwood.schema.config.painting import PaintingConfig
from sapwood.schema.config.server import ServerConfig

MODEL_INDEX = "model_index.json"
_COMMAND_LINE = "the command line"
_FOR_BOTH = {
    "model",
    "served_model_name",
    "enable_metrics",
    "enable_trace",
    "otlp_traces_endpoint",
    "watchdog_timeout",
    "soft_watchdog_timeout",
}
_LANGUAGE_ONLY = {
    "grpc_mode",
    "unsupported_fields",
    "responses_store",
    "responses_retention",
    "batch_concurrency",
    "batch_priority_gap",
    "max_samples_per_request",
    "max_stop_strings",
    "max_stop_length",
    "max_logprobs_per_call",
    "ray_address",
}
"""Options of a server that would do nothing for one that draws."""


def draws(asked: Asked) -> bool:
    """Whether the model is a diffusers folder: one with model_index.json."""
    return (Path(asked.build(ModelConfig).model) / MODEL_INDEX).is_file()


def refuse_for_painting(asked: Asked) -> None:
    """ConfigError for an option on the command line that does nothing for a model that draws."""
    for config in (*COMPONENTS, ObservabilityConfig, ServerConfig):
        for spec in option_specs(config):
            is_idle = spec.name in _FOR_BOTH or (
                config is ServerConfig and spec.name not in _LANGUAGE_ONLY
            )
            if not is_idle and _is_on_command_line(asked, spec.name):
                raise ConfigError(
                    f"{spec.flag} does nothing for a diffusion model, and this folder has "
                    f"{MODEL_INDEX}; leave it out"
                )


def refuse_without_painting(asked: Asked) -> None:
    """ConfigError for an option on the command line that only a model that draws has."""
    for spec in option_specs(PaintingConfig):
        if _is_on_command_line(asked, spec.name):
            raise ConfigError(
                f"{spec.flag} is for diffusion models, but {asked.build(ModelConfig).model} is no "
                f"folder with {MODEL_INDEX}; leave it out"
            )


def _is_on_command_line(asked: Asked, name: str) -> bool:
    given = asked.given.get(name)
    return given is not None and given.source == _COMMAND_LINE
