"""The services behind the dialects: the engine, the text machinery and the names of one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from sapwood.base.clock import Clock, MonotonicClock
from sapwood.base.errors import ConfigError, InvalidRequest, NotFound
from sapwood.frontends.serving.adapters import NOT_ENABLED, AdapterRegistry
from sapwood.frontends.serving.engine_figures import EngineFigures
from sapwood.frontends.serving.limits import RequestLimits
from sapwood.frontends.serving.sessions import Sessions
from sapwood.observe.requests import RequestObserver
from sapwood.schema.client import EngineClient
from sapwood.schema.media_source import MediaKind
from sapwood.schema.pooling import Pooling, Task, why_not
from sapwood.schema.sampling import DEFAULTABLE, SamplingParams
from sapwood.schema.unsupported import OnUnsupported
from sapwood.schema.weight_summary import WeightSummary
from sapwood.text.formats import AnswerFormats
from sapwood.text.generation import TextGenerator
from sapwood.text.speech import SpeechVocabulary
from sapwood.text.template import ChatTemplate
from sapwood.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # a gateway, which makes chats with these services, has no numpy
    from sapwood.multimodal.listener import Listener

INITIAL_VERSION = "default"
"""The name of the weights that the server started with, unless --weight-version says another."""


@dataclass(slots=True)
class ServedWeights:
    """The weights that are served now, and how; orders change it.

    version    their name
    path       the checkpoint that they were last read from; None: that of the start
    is_paused  whether generation is paused
    settings   the options that were changed since the start, by name
    """

    version: str = INITIAL_VERSION
    path: str | None = None
    is_paused: bool = False
    settings: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything that a dialect needs to answer requests about one model.

    template          the chat template; None: the model has none, and chat is refused
    model_name        the name that the API shows and accepts
    default_sampling  the model's own defaults of the parameters in DEFAULTABLE; a request's values
                      come first, and OpenAI's defaults last
    preferred_sampling  those of the options, which hold in SGLang's own dialect too
    has_dialect_defaults  whether a dialect with sampling defaults of its own uses these for a model
                      without any; if not, OpenAI's hold in all dialects
    weights           a summary of the model's weight files
    formats           the formats of the model's thinking and tool calls
    created           Unix time in seconds at which the server started
    options           the configuration as it was asked for; the engine says how it was resolved
    observer          counts, times and logs the requests
    figures           the engine's figures, which the caller keeps up to date; None: they are asked
                      for when a route needs them
    serves_metrics    whether /metrics answers
    custom_labels_header  name of the header with a request's own metric labels
    on_unsupported    what becomes of a call with a field that asks for what the server does not do
    pooling           how the model makes embeddings or scores; None: the model generates
    adapters          the LoRA adapters by name
    listener          decodes files of sound; None: the model hears nothing
    speech            the tokens of a model that transcribes
    media_markers     kind -> the text that stands for a picture or a video in a prompt; none: the
                      model takes only text
    served            which weights the engine has now
    sessions          the open sessions
    replicas          the engines behind `engine`, in the order of their ranks; (): that one alone
    """

    engine: EngineClient
    generator: TextGenerator
    tokenizer: Tokenizer
    template: ChatTemplate | None
    model_name: str
    model_path: str
    created: int
    version: str
    default_sampling: Mapping[str, float] = field(default_factory=dict)
    preferred_sampling: Mapping[str, float] = field(default_factory=dict)
    has_dialect_defaults: bool = True
    weights: WeightSummary = field(default_factory=WeightSummary)
    formats: AnswerFormats = field(default_factory=AnswerFormats)
    tokenizer_path: str | None = None
    model_type: str | None = None
    architectures: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    pooling: Pooling | None = None
    clock: Clock = field(default_factory=MonotonicClock)
    limits: RequestLimits = field(default_factory=RequestLimits)
    observer: RequestObserver = field(default_factory=RequestObserver)
    figures: EngineFigures | None = None
    serves_metrics: bool = False
    custom_labels_header: str = "x-custom-labels"
    on_unsupported: OnUnsupported = "error"
    adapters: AdapterRegistry | None = None
    replicas: tuple[EngineClient, ...] = ()
    listener: Listener | None = None
    speech: SpeechVocabulary | None = None
    media_markers: Mapping[MediaKind, str] = field(default_factory=dict)
    served: ServedWeights = field(default_factory=ServedWeights)
    sessions: Sessions = field(default_factory=lambda: Sessions(MonotonicClock()))

    def __post_init__(self) -> None:
        unknown = sorted(set(self.default_sampling) - set(DEFAULTABLE))
        if unknown:
            raise ConfigError(
                f"default sampling parameters {', '.join(unknown)} are not among "
                f"{', '.join(DEFAULTABLE)}"
            )
        try:
            SamplingParams(**self.default_sampling)  # type: ignore[arg-type]
        except InvalidRequest as error:
            raise ConfigError(
                f"the model's default sampling parameters are out of range: {error.message}"
            ) from error

    def close(self) -> None:
        """End the processes that prepare pictures, videos and sounds. May be called twice."""
        self.generator.close()
        if self.listener is not None:
            self.listener.close()

    def check_task(self, wanted: Task | Literal["tokens"]) -> None:
        """Raises InvalidRequest, with the way out, unless the model can do the task."""
        unable = why_not(self.pooling, wanted)
        if unable is not None:
            raise InvalidRequest(unable)

    def adapter_of(self, asked: str, lora_path: str | None = None) -> str:
        """The LoRA adapter that a request names; "": the base model.

        asked      its `model`: the served model's name, that and a colon and an adapter's name, or
                   an adapter's name; an adapter that is named here wins over the other
        lora_path  the name in the field of that name
        Raises     NotFound or InvalidRequest, which name the field
        """
        registry = self.adapters
        if registry is not None and registry.is_on:
            for base in (self.model_name, "default", "unknown"):
                if not asked.startswith(f"{base}:"):
                    continue
                if adapter := asked[len(base) + 1 :].strip():
                    return registry.check(adapter, "model")
                asked = base  # nothing after the colon names no adapter
                break
            if registry.knows(asked) and asked != self.model_name:
                return asked
        self.check_model(asked)
        if not lora_path:
            return ""
        if registry is None:
            raise InvalidRequest(NOT_ENABLED, param="lora_path")
        return registry.check(lora_path, "lora_path")

    def replica_of(self, asked: int | None) -> int | None:
        """The replica that a request asks for; InvalidRequest if there is none of that number."""
        count = max(1, len(self.replicas))
        if asked is not None and not 0 <= asked < count:
            numbers = f"replicas 0 to {count - 1}" if count > 1 else "one replica, number 0"
            raise InvalidRequest(
                f"data_parallel_rank is {asked} but this server has {numbers}; leave it out",
                param="data_parallel_rank",
            )
        return asked

    def check_model(self, asked: str) -> None:
        """Raises NotFound unless `asked` is the served model's name or stands for no name."""
        # SGLang's router writes "unknown" where its client named no model.
        if asked not in ("", "default", "unknown", self.model_name):
            raise NotFound(
                f"the model {asked!r} is not served here; this server has {self.model_name!r}",
                param="model",
            )
