"""The gRPC connection to one worker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from sapwood.base.errors import ConfigError
from sapwood.gateway.client import NotConnected, Origin, WorkerFailure
from sapwood.gateway.link import Metadata, TokenAnswer
from sapwood.gateway.rpc.answers import GeneratedTokens, OneOutput, RefusedCall, Stream, broken
from sapwood.gateway.rpc.messages import Messages, embed_message, generate_message
from sapwood.rpc import methods
from sapwood.rpc import scheduler_pb2 as pb
from sapwood.rpc.methods import KEEPALIVE_MS, MAX_ANSWER_BYTES, Answer, Asked, Method
from sapwood.rpc.status import status_of
from sapwood.schema.request import Generate

DEAD_AFTER_MS = 20_000
"""A worker that answers no ping for so long is gone."""
RECONNECT_MS = 200
MAX_RECONNECT_MS = 2000


class RpcLink:
    """Talks to a worker by one connection, over which all requests go side by side.

    The connection is opened with the first request, and again after it has broken.
    """

    def __init__(
        self, origin: Origin, *, connect_timeout_s: float, files: tuple[str | None, ...] = ()
    ) -> None:
        """files  of TLS: authorities, the gateway's certificate and its key, for `grpcs://`"""
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        options = [
            ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.keepalive_time_ms", 3 * KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", DEAD_AFTER_MS),
            ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS),
            ("grpc.min_reconnect_backoff_ms", int(connect_timeout_s * 1000)),
            ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_MS),
            # Each worker is asked by a connection of its own, also if two have one address.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
            # The gateway sends again what may be sent again.
            ("grpc.enable_retries", 0),
        ]
        address = f"{host}:{origin.port}"
        if origin.tls:
            credentials = grpc.ssl_channel_credentials(*map(_read, files))
            self._channel = grpc.aio.secure_channel(address, credentials, options=options)
        else:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        self._ends: tuple[int, ...] = ()
        self._unanswered: dict[Any, str | None] = {}

    async def send(
        self, request: Generate, *, lora: str, max_new_tokens: int | None, metadata: Metadata
    ) -> TokenAnswer:
        try:
            if request.options.embed is not None:
                embedded = self._call(methods.EMBED, embed_message(request), metadata)
                return OneOutput(request, await self._first(embedded, embedded))
            message = generate_message(request, lora=lora, max_new_tokens=max_new_tokens)
            method = methods.GENERATE
            ask: Any = self._channel.unary_stream(
                method.path, method.asked.SerializeToString, method.answer.FromString
            )
            call: Stream = ask(message, metadata=metadata)
            first = await self._first(call, call.read())
        except grpc.aio.AioRpcError as error:
            return RefusedCall(error)
        if first is grpc.aio.EOF:
            raise NotConnected("the answer has ended before its first token")
        return GeneratedTokens(call, first, Messages(request, self._ends))

    async def ask(
        self, method: str, path: str, *, body: bytes, metadata: Metadata, timeout_s: float
    ) -> tuple[int, bytes]:
        asked = _ASKED.get((method, path))
        if asked is None:
            return 404, b'{"message": "a worker that is reached by gRPC is not asked for this"}'
        try:
            async with asyncio.timeout(timeout_s):
                return await asked(self, body, metadata)
        except TimeoutError:
            raise WorkerFailure(f"no answer to {method} {path} within {timeout_s:g} s") from None
        except grpc.aio.AioRpcError as error:
            code = error.code()
            if code is grpc.StatusCode.UNAVAILABLE:
                raise broken(error) from error
            return status_of(code), json.dumps({"message": error.details()}).encode()

    def give_up_unanswered(self, reason: str) -> None:
        for call in self._unanswered:
            self._unanswered[call] = reason
            call.cancel()

    async def close(self) -> None:
        await self._channel.close()

    async def _first(self, call: Any, beginning: Awaitable[Any]) -> Any:
        """The beginning of an answer, unless the worker is given up before it."""
        self._unanswered[call] = None
        try:
            return await beginning
        except asyncio.CancelledError:
            reason = self._unanswered[call]
            if reason is None:
                call.cancel()
                raise
            raise NotConnected(reason) from None
        finally:
            del self._unanswered[call]

    def _call(
        self, method: Method[Asked, Answer], message: Asked, metadata: Metadata
    ) -> grpc.aio.UnaryUnaryCall[Asked, Answer]:
        ask: Any = self._channel.unary_unary(
            method.path, method.asked.SerializeToString, method.answer.FromString
        )
        made: grpc.aio.UnaryUnaryCall[Asked, Answer] = ask(message, metadata=metadata)
        return made

    async def _health(self, body: bytes, metadata: Metadata) -> tuple[int, bytes]:
        told = await self._call(methods.HEALTH_CHECK, pb.HealthCheckRequest(), metadata)
        return 200 if told.healthy else 503, _json(told)

    async def _models(self, body: bytes, metadata: Metadata) -> tuple[int, bytes]:
        told = await self._call(methods.MODEL_INFO, pb.GetModelInfoRequest(), metadata)
        self._ends = tuple(told.eos_token_ids)
        card = {
            "id": told.served_model_name or told.model_path,
            "object": "model",
            "owned_by": "sglang",
            "root": told.model_path,
            "max_model_len": told.max_context_length,
        }
        return 200, json.dumps({"object": "list", "data": [card]}).encode()

    async def _flush(self, body: bytes, metadata: Metadata) -> tuple[int, bytes]:
        told = await self._call(methods.FLUSH_CACHE, pb.FlushCacheRequest(), metadata)
        return 200 if told.success else 400, _json(told)

    async def _loads(self, body: bytes, metadata: Metadata) -> tuple[int, bytes]:
        told = await self._call(methods.LOADS, pb.GetLoadsRequest(), metadata)
        return 200, _json(told)

    async def _abort(self, body: bytes, metadata: Metadata) -> tuple[int, bytes]:
        """A request of that id; by its prefix, or all at once, none can be aborted here."""
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            asked = None
        rid = asked.get("rid") if isinstance(asked, dict) else None
        if not isinstance(rid, str) or not rid:
            return 400, b'{"message": "rid must name a request, where gRPC is spoken"}'
        told = await self._call(methods.ABORT, pb.AbortRequest(request_id=rid), metadata)
        return 200, _json(told)


_ASKED: dict[
    tuple[str, str], Callable[[RpcLink, bytes, Metadata], Awaitable[tuple[int, bytes]]]
] = {
    ("GET", "/health"): RpcLink._health,
    ("GET", "/v1/models"): RpcLink._models,
    ("GET", "/v1/loads"): RpcLink._loads,
    ("POST", "/flush_cache"): RpcLink._flush,
    ("POST", "/abort_request"): RpcLink._abort,
}


def _json(message: Message) -> bytes:
    told = MessageToDict(message, preserving_proto_field_name=True)
    return json.dumps(told).encode()


def _read(path: str | None) -> bytes | None:
    try:
        return None if path is None else Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"the files for TLS to workers cannot be used: {error}; see --worker-ca-certs, "
            "--worker-certfile and --worker-keyfile"
        ) from error
