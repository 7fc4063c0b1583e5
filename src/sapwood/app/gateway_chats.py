"""Chat completions that the gateway makes itself, of engines that only generate tokens.

The gateway knows no dialects, and the dialects know no workers. Here they meet: the dialect of
OpenAI's API answers, as in an engine's server, and its engine are the gateway's workers.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from weakref import WeakKeyDictionary

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from sapwood.app.model_defaults import sampling_defaults
from sapwood.base.errors import ConfigError
from sapwood.frontends.openai.chat import answer_chat
from sapwood.frontends.openai.protocol import CHAT_FIELDS
from sapwood.frontends.serving.services import Services
from sapwood.gateway.exchange import Proxy
from sapwood.gateway.headers import REQUEST_ID, request_id
from sapwood.gateway.plain.engine import PlainEngine
from sapwood.gateway.proxy import Forwarded
from sapwood.gateway.routing_fields import routing_fields
from sapwood.gateway.tokenizers.registry import UNNAMED, Loaded, Tokenizers
from sapwood.gateway.tokenizers.served import ServedTokenizers
from sapwood.http.body import body_limits, parse_object, read_bytes
from sapwood.http.endpoints import Handler
from sapwood.schema.config.gateway import GatewayConfig
from sapwood.schema.fields import parse
from sapwood.text.formats import AUTO, AnswerFormats
from sapwood.text.generation import TextGenerator


class GatewayChats:
    """POST /v1/chat/completions. A request about a model without a tokenizer goes to a worker.

    Raises ConfigError for a parser that is not known
    """

    def __init__(self, config: GatewayConfig, tokenizers: Tokenizers, proxy: Proxy) -> None:
        self._config = config
        self._tokenizers = tokenizers
        self._proxy = proxy
        self._created = int(time.time())
        self._made: WeakKeyDictionary[Loaded, Services] = WeakKeyDictionary()
        self._default = default = tokenizers.of_model("", is_only=True)
        assert default is not None, "the options name a tokenizer"
        if default.template is None:
            raise ConfigError(
                f"{config.tokenizer_source} has no chat template, so that the gateway cannot make "
                "chats; give --chat-template"
            )
        self._services_of(default)

    async def answer(self, request: Request) -> Response:
        raw = await read_bytes(request)
        model = routing_fields(raw).model or ""
        base_models = self._proxy.fleet.base_models
        loaded = self._tokenizers.of_model(model, is_only=base_models <= {model})
        if loaded is None or loaded.template is None:
            return Forwarded(self._proxy, request, body=raw)
        body = parse_object(raw, max_depth=body_limits(request).max_depth)
        asked = parse(body, CHAT_FIELDS)
        model = "" if asked.model in UNNAMED else asked.model
        shown = model or min(base_models, default=self._config.tokenizer_source or "")
        # Of this request alone: its engine sends the request's headers to the workers.
        id_ = request_id(
            request.scope["headers"], self._proxy.limits.id_headers, os.urandom(16).hex().encode()
        )
        named = {**request.scope, "headers": [*request.scope["headers"], (REQUEST_ID, id_)]}
        engine = PlainEngine(self._proxy, named, model)
        services = replace(
            self._services_of(loaded),
            engine=engine,
            generator=self._generator(engine, loaded),
            model_name=shown,
        )
        return _Named(await answer_chat(asked, request, services), id_)

    def _generator(self, engine: PlainEngine, loaded: Loaded) -> TextGenerator:
        async def encode(text: str, add_special_tokens: bool) -> list[int]:
            return await self._tokenizers.encode(
                loaded, text, add_special_tokens=add_special_tokens, param="messages"
            )

        return TextGenerator(engine, loaded.tokenizer, encode=encode)

    def _services_of(self, loaded: Loaded) -> Services:
        """What requests about that tokenizer's model have in common."""
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
                tool_call_parser=self._config.tool_call_parser or AUTO,
                reasoning_parser=self._config.reasoning_parser or AUTO,
                template=loaded.template,
            ),
            model_name=str(loaded.directory),
            model_path=str(loaded.directory),
            created=self._created,
            version=version("sapwood"),
            default_sampling=sampling_defaults(directory),
        )
        return made


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


def make_chats(config: GatewayConfig, tokenizers: ServedTokenizers, proxy: Proxy) -> Handler:
    """What answers chat completions at a gateway with these options."""
    return GatewayChats(config, tokenizers.registry, proxy).answer
