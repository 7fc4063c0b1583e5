"""The API side of one engine: tokenizer, template, generator. Torch-free, so it starts fast."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from sapwood.app.building.model_defaults import read_json_if_there, reading, sampling_defaults
from sapwood.app.serving.media import build_listener, build_preparer
from sapwood.app.serving.observability import build_observer
from sapwood.base.errors import ConfigError
from sapwood.frontends.serving.adapters import AdapterRegistry
from sapwood.frontends.serving.engine_figures import EngineFigures
from sapwood.frontends.serving.services import ServedWeights, Services
from sapwood.models.pooling import pooling_of
from sapwood.schema.client import EngineClient
from sapwood.schema.config.decision import Decision
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.model import ModelConfig
from sapwood.schema.config.observability import ObservabilityConfig
from sapwood.schema.logits_processors import known_processors
from sapwood.store import ModelFiles, load_catalogue
from sapwood.store.summary import summarize
from sapwood.text.absent import AbsentTokenizer
from sapwood.text.formats import AnswerFormats
from sapwood.text.generation import TextGenerator
from sapwood.text.speech import SpeechVocabulary
from sapwood.text.template import ChatTemplate
from sapwood.text.tokenizer import Tokenizer


def build_services(
    engine: EngineClient,
    files: ModelFiles,
    config: EngineConfig,
    observability: ObservabilityConfig | None = None,
    replicas: Sequence[EngineClient] = (),
) -> Services:
    """The services that the HTTP dialects and the Python API use.

    replicas  the engines behind `engine`, if it stands for several
    """
    observed = observability or ObservabilityConfig()
    observer = build_observer(observed, config)
    tokenizer_path = _tokenizer_path(files, config.model)
    tokenizer = _tokenizer(files, config.model)
    model = read_json_if_there(files.path / "config.json")
    with reading(files.path / "config.json"):
        pooling = pooling_of(
            model,
            files.path,
            is_embedding=config.model.is_embedding,
            method=config.model.pooling_method,
        )
    architectures = tuple(model.get("architectures") or ())
    template = _template(tokenizer, config.model, architectures)
    listener = build_listener(model, config.media)
    shows = "vision_config" in model and not config.vision.language_only
    if config.model.skip_tokenizer_init and (shows or listener is not None):
        raise ConfigError(
            f"{files.name} takes pictures or sound, whose places in a prompt its tokenizer finds; "
            "leave out --skip-tokenizer-init, or add --language-only to a model that sees"
        )
    speech = None
    if listener is not None:
        generation = read_json_if_there(files.path / "generation_config.json")
        speech = SpeechVocabulary.of_model(tokenizer, model, generation)
    preparer = build_preparer(
        files.path,
        model,
        tokenizer,
        config.media,
        language_only=config.vision.language_only,
    )
    if preparer is not None:
        observer.metrics.preparing = preparer.figures
    return Services(
        engine=engine,
        listener=listener,
        speech=speech,
        media_markers={} if preparer is None else preparer.markers,
        replicas=tuple(replicas),
        generator=TextGenerator(
            engine,
            tokenizer,
            vocab_size=model.get("vocab_size"),
            pooling=pooling,
            logits_processors=known_processors(),
            allow_code=config.execution.enable_custom_logit_processor,
            tells_hidden=config.execution.enable_return_hidden_states,
            hidden_size=model.get("hidden_size"),
            preparer=preparer,
            stream_interval=config.scheduler.stream_interval,
            truncates=config.scheduler.allow_auto_truncate,
        ),
        tokenizer=tokenizer,
        template=template,
        formats=_answer_formats(config.model, template, architectures),
        model_name=config.model.served_model_name or config.model.model,
        model_path=config.model.model,
        served=ServedWeights(version=config.model.weight_version),
        tokenizer_path=str(tokenizer_path),
        model_type=model.get("model_type"),
        architectures=architectures,
        created=int(time.time()),
        version=version("sapwood"),
        default_sampling=default_sampling(files.path, config.model),
        preferred_sampling=config.model.preferred_sampling,
        has_dialect_defaults=config.model.sampling_defaults == "model",
        weights=summarize(files),
        options=config.shown(),
        pooling=pooling,
        adapters=AdapterRegistry(engine, config.lora),
        observer=observer,
        figures=EngineFigures(replicas or (engine,), observer),
        serves_metrics=observed.enable_metrics,
        custom_labels_header=observed.tokenizer_metrics_custom_labels_header,
    )


def default_sampling(directory: Path, config: ModelConfig) -> dict[str, float]:
    """Of what a request leaves open: from the options, the model's files, then the catalogue."""
    if config.sampling_defaults != "model":
        return config.preferred_sampling
    entry = load_catalogue().get(config.model)
    advised = {} if entry is None else dict(entry.sampling)
    return advised | sampling_defaults(directory) | config.preferred_sampling


def decisions_about_answers(files: ModelFiles, config: ModelConfig) -> tuple[Decision, ...]:
    """What `Services.formats` decides, without an engine."""
    tokenizer = _tokenizer(files, config)
    architectures = tuple(read_json_if_there(files.path / "config.json").get("architectures") or ())
    template = _template(tokenizer, config, architectures)
    return _answer_formats(config, template, architectures).decisions


def _tokenizer_path(files: ModelFiles, config: ModelConfig) -> Path:
    return Path(config.tokenizer_path or files.path)


def _tokenizer(files: ModelFiles, config: ModelConfig) -> Tokenizer:
    if config.skip_tokenizer_init:
        return AbsentTokenizer()
    return Tokenizer.from_directory(_tokenizer_path(files, config))


def _template(
    tokenizer: Tokenizer, config: ModelConfig, architectures: tuple[str, ...]
) -> ChatTemplate | None:
    """None of a server without a tokenizer: it can make no chats."""
    if config.skip_tokenizer_init:
        return None
    return ChatTemplate.of_model(
        tokenizer,
        override=config.chat_template,
        name=config.hf_chat_template_name,
        architectures=architectures,
    )


def _answer_formats(
    config: ModelConfig, template: ChatTemplate | None, architectures: tuple[str, ...]
) -> AnswerFormats:
    return AnswerFormats.of_model(
        tool_call_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
        template=template,
        architectures=architectures,
        keeps_unknown=config.unknown_tool_calls == "call",
    )
