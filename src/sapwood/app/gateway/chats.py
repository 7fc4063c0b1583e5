"""Chats that the gateway makes itself, of engines that only generate tokens.

The gateway knows no dialects, and the dialects know no workers. Here they meet: the dialects of
OpenAI's and Anthropic's APIs answer, as in an engine's server, and their engine are the gateway's
workers.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from weakref import WeakKeyDictionary

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from sapwood.app.building.model_defaults import sampling_defaults
from sapwood.app.gateway.making import Make, with_body
from sapwood.app.gateway.parsing import parsing_dialect
from sapwood.base.errors import (
    ConfigError,
    InvalidRequest,
    NotFound,
    SapwoodError,
    UnsupportedFeature,
)
from sapwood.frontends.anthropic.messages import count_tokens, create_message
from sapwood.frontends.openai.chat import chat_completions
from sapwood.frontends.responses.service import Responses
from sapwood.frontends.serving.services import Services
from sapwood.gateway.exchange import Proxy
from sapwood.gateway.headers import REQUEST_ID, request_id
from sapwood.gateway.plain.engine import PlainEngine
from sapwood.gateway.proxy import Forwarded
from sapwood.gateway.routing_fields import routing_fields
from sapwood.gateway.tokenizers.registry import UNNAMED, Loaded, Tokenizers
from sapwood.gateway.tokenizers.served import ServedTokenizers
from sapwood.gateway.worker import WorkerState
from sapwood.http.body import body_limits, parse_object, read_bytes
from sapwood.http.endpoints import Handler
from sapwood.http.errors import error_response, openai_body
from sapwood.schema.config.gateway import GatewayConfig
from sapwood.text.formats import AUTO, AnswerFormats
from sapwood.text.generation import TextGenerator

MADE_OF_TOKENS = ("/v1/completions", "/generate", "/v1/embeddings")
"""Paths that are made here only for workers that know nothing but tokens."""


@dataclass(frozen=True, slots=True)
class _Model:
    """By what the chats of one model are made; a tokenizer has the same parsers all its life."""

    loaded: Loaded
    tool_parser: str
    reasoning_parser: str


class GatewayChats:
    """The endpoints of chats. A request about a model without a tokenizer goes to a worker, and so
    do all where neither the options nor the model's workers name a parser.

    Raises ConfigError for a parser that is not known
    """

    def __init__(self, config: GatewayConfig, served: ServedTokenizers, proxy: Proxy) -> None:
        self._config = config
        self._tokenizers: Tokenizers = served.registry
        self._brought = served.brought
        self._proxy = proxy
        self._created = int(time.time())
        self._made: WeakKeyDictionary[Loaded, Services] = WeakKeyDictionary()
        self._default: Loaded | None = None
        formats = AnswerFormats()
        if config.makes_chats:
            self._default = default = self._tokenizers.of_model("", is_only=True)
            assert default is not None, "the options name a tokenizer"
            if default.template is None:
                raise ConfigError(
                    f"{config.tokenizer_source} has no chat template, so that the gateway cannot "
                    "make chats; give --chat-template"
                )
            formats = self._services_of(_Model(default, *self._parsers)).formats
        self.dialect = parsing_dialect(formats)
        self.handlers: dict[str, Handler] = {
            path: functools.partial(self._answer, make)
            for path, make in (
                ("/v1/chat/completions", chat_completions),
                ("/v1/messages", create_message),
                ("/v1/messages/count_tokens", count_tokens),
            )
        }
        self.handlers |= {path: functools.partial(self._of_tokens, path) for path in MADE_OF_TOKENS}

    def respond(self, request: Request, body: bytes) -> Response:
        if not self._makes_chats:
            name = routing_fields(body).model or ""
            if not self._proxy.fleet.makes_tokens(name):
                return Forwarded(self._proxy, request, body=body)
        return _Made(body, request, functools.partial(self._answer, _response))

    async def _answer(self, make: Make, request: Request) -> Response:
        """Of an endpoint of chats."""
        if not self._makes_chats and not self._proxy.fleet.has_links:
            return Forwarded(self._proxy, request)
        raw = await read_bytes(request)
        name = self._named(routing_fields(raw).model or "")
        model = self._model(name)
        if model is not None and model.loaded.template is not None:
            return await self._made_of(model, make, name, request, raw)
        if self._proxy.fleet.makes_tokens(name):
            raise _lacks("chat template", name)
        return Forwarded(self._proxy, request, body=raw)

    async def _of_tokens(self, path: str, request: Request) -> Response:
        """Of an endpoint that is made here only for workers that know nothing but tokens."""
        if not self._proxy.fleet.has_links:
            return Forwarded(self._proxy, request)
        raw = await read_bytes(request)
        name = self._named(routing_fields(raw).model or "")
        if not self._proxy.fleet.makes_tokens(name):
            return Forwarded(self._proxy, request, body=raw)
        model = self._model(name)
        if model is None:
            raise _lacks("tokenizer", name)
        return await self._made_of(model, _makers()[path], name, request, raw)

    async def _made_of(
        self, model: _Model, make: Make, name: str, request: Request, raw: bytes
    ) -> Response:
        base_models = self._proxy.fleet.base_models
        # Of this request alone: its engine sends the request's headers to the workers.
        id_ = request_id(
            request.scope["headers"], self._proxy.limits.id_headers, os.urandom(16).hex().encode()
        )
        named = {**request.scope, "headers": [*request.scope["headers"], (REQUEST_ID, id_)]}
        engine = PlainEngine(self._proxy, named, name)
        services = replace(
            self._services_of(model),
            engine=engine,
            generator=self._generator(engine, model.loaded),
            model_name=name or min(base_models, default=self._config.tokenizer_source or ""),
        )
        return _Named(await make(with_body(request.scope, raw, request.receive), services), id_)

    @property
    def _makes_chats(self) -> bool:
        return self._config.makes_chats or self._brought.makes_chats

    @property
    def _parsers(self) -> tuple[str, str]:
        """Those of the options, for models whose workers bring none."""
        return self._config.tool_call_parser or AUTO, self._config.reasoning_parser or AUTO

    def _named(self, name: str) -> str:
        """The model that a request means; "": whatever the workers serve.

        Raises InvalidRequest if the request must say which
        """
        fleet = self._proxy.fleet
        if name in fleet.base_models or name not in UNNAMED:
            return name
        if len(fleet.base_models) < 2:
            return ""
        ready = [worker for worker in fleet if worker.state is WorkerState.READY]
        models = frozenset[str]().union(*(worker.base_models for worker in ready))
        if len(models) > 1:
            known = ", ".join(sorted(models)[:20])
            raise InvalidRequest(
                f"the workers serve several models; name one of them in model: {known}",
                param="model",
            )
        return next(iter(models), "")

    def _model(self, name: str) -> _Model | None:
        """The model of that name; None: its workers answer by themselves, or nobody can."""
        fleet, known = self._proxy.fleet, self._proxy.fleet.base_models
        name = name or next(iter(known), "")
        brought = self._brought.chats_of(name)
        if brought is not None:
            loaded, parts = brought
            return _Model(loaded, parts.tool_parser or AUTO, parts.reasoning_parser or AUTO)
        names = [name]
        if fleet.makes_tokens(name):  # such workers name no adapters
            names += [base for base in known if name.startswith(f"{base}:")]
        elif not self._config.makes_chats:
            return None
        tokenizers = (self._tokenizers.of_model(one, is_only=known <= {one}) for one in names)
        found = next((one for one in tokenizers if one is not None), None)
        return None if found is None else _Model(found, *self._parsers)

    def _generator(self, engine: PlainEngine, loaded: Loaded) -> TextGenerator:
        async def encode(text: str, add_special_tokens: bool) -> list[int]:
            return await self._tokenizers.encode(
                loaded, text, add_special_tokens=add_special_tokens, param="messages"
            )

        return TextGenerator(engine, loaded.tokenizer, encode=encode)

    def _services_of(self, model: _Model) -> Services:
        """What requests about the model have in common."""
        loaded = model.loaded
        made = self._made.get(loaded)
        if made is not None:
            return made
        nobody = PlainEngine(self._proxy, {"headers": []}, "")
        directory = loaded.directory
        if loaded is self._default and self._config.model_path is not None:
            directory = Path(self._config.model_path)
        made = self._made[loaded] = Services(
            engine=nobody,
            generator=self._generator(nobody, loaded),
            tokenizer=loaded.tokenizer,
            template=loaded.template,
            formats=AnswerFormats.of_model(
                tool_call_parser=model.tool_parser,
                reasoning_parser=model.reasoning_parser,
                template=loaded.template,
            ),
            model_name=str(loaded.directory),
            model_path=str(loaded.directory),
            created=self._created,
            version=version("sapwood"),
            default_sampling=sampling_defaults(directory),
        )
        return made


def _lacks(what: str, model: str) -> UnsupportedFeature:
    return UnsupportedFeature(
        f"the workers of the model {model[:200]!r} are reached by gRPC, which knows only token "
        f"ids, and the gateway has no {what} for it; start the gateway with --tokenizer-path or "
        "--model-path (and --chat-template), or add a tokenizer by POST /v1/tokenizers",
        param="model",
    )


class _Named(Response):
    """An answer with its request's name in a header, as forwarded ones have it."""

    def __init__(self, answer: Response, id_: bytes) -> None:
        self._answer = answer
        self._id = id_
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (REQUEST_ID, self._id)]}
            await send(message)

        await self._answer(scope, receive, named)


class _Made(Response):
    """What `answer` makes of a request with another body."""

    def __init__(
        self, body: bytes, request: Request, answer: Callable[[Request], Awaitable[Response]]
    ) -> None:
        self._body = body
        self._request = request
        self._answer = answer
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The request's own scope has the application, and so the limits on bodies.
        asked = with_body(self._request.scope, self._body, receive)
        await (await self._answer(asked))(scope, receive, send)


def _makers() -> Mapping[str, Make]:
    """What answers the paths of MADE_OF_TOKENS. UnsupportedFeature if a package is missing, which a
    gateway without workers by gRPC does not need."""
    try:
        from sapwood.app.gateway.tokens import MAKERS
    except ImportError as error:
        raise UnsupportedFeature(
            "requests for workers by gRPC need the package numpy at the gateway; install it with "
            "`pip install numpy`"
        ) from error
    return MAKERS


async def _response(request: Request, services: Services) -> Response:
    """A response of the Responses API; the gateway has put what came before into its input."""
    raw = await read_bytes(request)
    asked = parse_object(raw, max_depth=body_limits(request).max_depth)
    if asked.get("background"):
        raise UnsupportedFeature(
            "background is not possible where the gateway makes the responses: an engine that "
            "only generates tokens keeps none; leave it out",
            param="background",
        )
    if asked.get("previous_response_id") is not None:
        raise NotFound(
            "the gateway keeps no responses, so none can be gone on from; send the whole "
            "conversation as input, or start the gateway with a --history-backend",
            param="previous_response_id",
        )

    async def chats(scope: Scope, receive: Receive, send: Send) -> None:
        inner = Request({**scope, "app": request.app}, receive)
        answer: Response
        try:
            answer = await chat_completions(inner, services)
        except SapwoodError as error:
            answer = error_response(error, openai_body)
        await answer(scope, receive, send)

    made = Responses(services, None, chats)
    return await made.create(with_body(request.scope, raw, request.receive))


def make_chats(config: GatewayConfig, tokenizers: ServedTokenizers, proxy: Proxy) -> GatewayChats:
    return GatewayChats(config, tokenizers, proxy)
