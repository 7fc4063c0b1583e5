"""What every call goes through: keys, the call's place in a trace, and errors as statuses."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError, Message

from sapwood.base.errors import InvalidRequest, SapwoodError
from sapwood.frontends.grpc.service import SchedulerService
from sapwood.frontends.serving.services import Services
from sapwood.http.auth import ServerKeys, given_key
from sapwood.http.callers import Role
from sapwood.http.errors import NotAllowed, NotAuthenticated
from sapwood.observe.call import Call, current_call
from sapwood.rpc import methods
from sapwood.rpc.methods import Method
from sapwood.rpc.status import MAX_DETAILS, code_of

log = logging.getLogger(__name__)

_TRACE_NAMES = frozenset({"traceparent", "tracestate"})

Context = grpc.aio.ServicerContext[Any, Any]
Unary = Callable[[Any], Coroutine[Any, Any, Message]]
Stream = Callable[[Any], AsyncGenerator[Message, None]]


def handlers(
    services: Services, service: SchedulerService, keys: ServerKeys
) -> list[grpc.GenericRpcHandler]:
    """All methods, for a gRPC server."""
    calls = _Calls(services, keys)
    unary: list[tuple[Method[Any, Any], Unary]] = [
        (methods.EMBED, service.embed),
        (methods.HEALTH_CHECK, service.health_check),
        (methods.ABORT, service.abort),
        (methods.MODEL_INFO, service.model_info),
        (methods.SERVER_INFO, service.server_info),
        (methods.LOADS, service.loads),
        (methods.FLUSH_CACHE, service.flush_cache),
        (methods.CHECK, service.check),
    ]
    streams: list[tuple[Method[Any, Any], Stream]] = [
        (methods.GENERATE, service.generate),
        (methods.WATCH, service.watch),
    ]
    by_service: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}
    for method, answer in unary:
        by_service.setdefault(method.service, {})[method.name] = calls.unary(method, answer)
    for method, stream in streams:
        by_service.setdefault(method.service, {})[method.name] = calls.stream(method, stream)
    return [grpc.method_handlers_generic_handler(name, own) for name, own in by_service.items()]


class _Calls:
    def __init__(self, services: Services, keys: ServerKeys) -> None:
        self._observer = services.observer
        self._keys = keys

    def unary(self, method: Method[Any, Any], answer: Unary) -> grpc.RpcMethodHandler[Any, Any]:
        async def call(raw: bytes, context: Context) -> Message:
            try:
                self._check_key(method, context)
                with self._traced(method, context):
                    return await answer(_parsed(method, raw))
            except SapwoodError as error:
                return await _abort(context, error)
            except Exception:  # noqa: BLE001 - the server goes on
                return await _abort(context, _bug(method))

        return grpc.unary_unary_rpc_method_handler(
            call,
            response_serializer=method.answer.SerializeToString,
        )

    def stream(self, method: Method[Any, Any], answer: Stream) -> grpc.RpcMethodHandler[Any, Any]:
        async def call(raw: bytes, context: Context) -> AsyncIterator[Message]:
            try:
                self._check_key(method, context)
                with self._traced(method, context):
                    # A call that its client cancels is cancelled here, which closes the stream.
                    async with aclosing(answer(_parsed(method, raw))) as messages:
                        async for message in messages:
                            yield message
            except SapwoodError as error:
                await _abort(context, error)
            except Exception:  # noqa: BLE001 - the server goes on
                await _abort(context, _bug(method))

        return grpc.unary_stream_rpc_method_handler(
            call,
            response_serializer=method.answer.SerializeToString,
        )

    def _check_key(self, method: Method[Any, Any], context: Context) -> None:
        if not self._keys.is_needed(method.access):
            return
        given = given_key(_metadata(context))
        caller = self._keys.find(given)
        if caller is None:
            problem = "this is not it" if given else "none was sent"
            raise NotAuthenticated(
                f"{method.name} needs a key of this server and {problem}; send it as the metadata "
                "`authorization: Bearer KEY`"
            )
        if method.access == "admin" and caller.role is not Role.ADMIN:
            raise NotAllowed(f"{method.name} needs the admin key of this server")

    @contextmanager
    def _traced(self, method: Method[Any, Any], context: Context) -> Iterator[None]:
        span = self._span(method, context)
        # Every call has a task, and so a context, of its own: nothing is to be put back.
        current_call.set(Call(path=method.path, trace=span))
        try:
            yield
        finally:
            if span is not None:
                span.end()

    def _span(self, method: Method[Any, Any], context: Context) -> Any:
        tracing = self._observer.tracing
        if tracing is None or method.access == "open":
            return None
        sent = _metadata(context)
        parent = {name: value for name, value in sent.items() if name in _TRACE_NAMES}
        attributes = {"rpc.system": "grpc", "rpc.method": method.path[1:]}
        return tracing.start(method.path[1:], parent=parent, is_server=True, attributes=attributes)


def _parsed(method: Method[Any, Any], raw: bytes) -> Any:
    """InvalidRequest if the bytes are no such message; gRPC itself would call it our failure."""
    try:
        return method.asked.FromString(raw)
    except DecodeError as error:
        raise InvalidRequest(f"this is no message for {method.name}: {error}") from None


def _metadata(context: Context) -> dict[str, str]:
    """What the client has sent beside its message, as HTTP's headers."""
    pairs = context.invocation_metadata() or ()
    return {name: value for name, value in pairs if isinstance(value, str)}


def _bug(method: Method[Any, Any]) -> SapwoodError:
    log.exception("%s failed", method.path)
    return SapwoodError("the server failed on this call; its log says why")


async def _abort(context: Context, error: SapwoodError) -> NoReturn:
    """Raises what ends the call with this status."""
    await context.abort(code_of(error.status), error.message[:MAX_DETAILS])
