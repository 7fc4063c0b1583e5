"""Tokenizers, templates and parsers that workers bring for the chats of their models."""

from __future__ import annotations

from dataclasses import dataclass, field

from sapwood.base.errors import ConfigError, InvalidRequest
from sapwood.gateway.model_parts import ModelParts
from sapwood.gateway.tokenizers.registry import Entry, Loaded, Tokenizers
from sapwood.gateway.worker import Worker
from sapwood.text.formats import AUTO, AnswerFormats


@dataclass(slots=True)
class _Brought:
    """What the workers of one model bring.

    entry    the tokenizer among the gateway's, named by the model
    workers  ids of those who bring it
    """

    parts: ModelParts
    entry: Entry
    workers: set[str] = field(default_factory=set)


class BroughtParts:
    """The parts of each model that some worker brings; see `gateway/model_parts.py`.

    The first worker of a model has them loaded, the others must bring the same ones or none, and
    with the last one they are gone.
    """

    def __init__(self, tokenizers: Tokenizers) -> None:
        self._tokenizers = tokenizers
        self._of_model: dict[str, _Brought] = {}
        self._model_of: dict[str, str] = {}

    def add(self, worker: Worker) -> None:
        parts = worker.spec.parts
        if parts is None:
            return
        try:
            AnswerFormats.of_model(
                tool_call_parser=parts.tool_parser or AUTO,
                reasoning_parser=parts.reasoning_parser or AUTO,
                template=None,
            )
        except ConfigError as error:
            raise InvalidRequest(error.message) from None
        if worker.spec.model_id is not None:
            self._bring(worker, worker.spec.model_id, parts)

    async def prepare(self, worker: Worker) -> None:
        parts = worker.spec.parts
        if parts is None:
            return
        model = _only_model(worker)
        entry = self._bring(worker, model, parts).entry
        await self._tokenizers.settled(entry)
        if entry.loaded is None:
            raise ConfigError(
                f"the tokenizer of {model} cannot be used: {entry.message}; remove the worker and "
                "add it with another tokenizer_path"
            )
        if parts.makes_chats and entry.loaded.template is None:
            raise ConfigError(
                f"{parts.tokenizer_path} has no chat template, so that the gateway cannot make "
                "chats; remove the worker and add it with a chat_template"
            )

    def remove(self, worker: Worker) -> None:
        model = self._model_of.pop(worker.id, None)
        if model is None:
            return
        brought = self._of_model[model]
        brought.workers.discard(worker.id)
        if not brought.workers:
            del self._of_model[model]
            self._tokenizers.release(brought.entry)

    @property
    def makes_chats(self) -> bool:
        """Whether the gateway makes the chats of any model because of them."""
        return any(brought.parts.makes_chats for brought in self._of_model.values())

    def chats_of(self, model: str) -> tuple[Loaded, ModelParts] | None:
        """By what the model's chats are made; None: no worker brings that, or not loaded yet."""
        brought = self._of_model.get(model)
        if brought is None or not brought.parts.makes_chats:
            return None
        loaded = brought.entry.loaded
        if loaded is None or loaded.template is None:
            return None
        return loaded, brought.parts

    def _bring(self, worker: Worker, model: str, parts: ModelParts) -> _Brought:
        if self._model_of.get(worker.id, model) != model:
            self.remove(worker)  # the engine was started again, with another model
        brought = self._of_model.get(model)
        if brought is None:
            entry = self._tokenizers.add(
                model, parts.tokenizer_path, parts.chat_template, is_brought=True
            )
            brought = self._of_model[model] = _Brought(parts, entry)
        elif brought.parts != parts:
            raise _contradiction(model, brought.parts, parts)
        brought.workers.add(worker.id)
        self._model_of[worker.id] = model
        return brought


def _only_model(worker: Worker) -> str:
    """InvalidRequest if it is not clear which model the worker's parts are for."""
    models = worker.base_models
    if len(models) != 1:
        serves = ", ".join(sorted(models)[:20]) or "it does not say what"
        raise InvalidRequest(
            f"tokenizer_path is of one model, but the worker does not serve exactly one: {serves}; "
            "remove the worker and add it with a model_id",
            param="tokenizer_path",
        )
    return next(iter(models))


def _contradiction(model: str, known: ModelParts, asked: ModelParts) -> InvalidRequest:
    names = ("tokenizer_path", "chat_template", "tool_parser", "reasoning_parser")
    differing = [name for name in names if getattr(known, name) != getattr(asked, name)]
    told = "; ".join(
        f"{name} {getattr(known, name)!r:.200} and {getattr(asked, name)!r:.200}"
        for name in differing
    )
    return InvalidRequest(
        f"the workers of {model} would contradict each other: {told}. Give the same as the others, "
        "give none of these fields, or remove the others first",
        param=differing[0],
    )
