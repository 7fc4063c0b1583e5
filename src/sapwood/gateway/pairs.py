"""Requests that two workers answer: one reads the prompt, the other one generates.

Both get the request at the same time. It names the place where the second worker finds the keys and
values that the first one makes: `bootstrap_host`, `bootstrap_port`, and `bootstrap_room`, a number
for each prompt. The client gets the second one's answer. Facts: SGLang 0.5.9, gateway and engine.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.types import Scope

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.gateway.client import Answer, PeerFailure, WorkerFailure
from sapwood.gateway.exchange import Exchange, Failed, OneWorker, Taken, Way
from sapwood.gateway.fleet import Fleet
from sapwood.gateway.headers import is_event_stream
from sapwood.gateway.prompt_logprobs import MAX_BYTES, PromptLogprobs, of_prefill
from sapwood.gateway.worker import Worker

PAIRED_PATHS = frozenset({"/generate", "/v1/completions", "/v1/chat/completions"})
"""What generates, and has the fields by which two engines find each other."""
_ONE_IS_ENOUGH = frozenset(
    {
        "/tokenize",
        "/v1/tokenize",
        "/detokenize",
        "/v1/detokenize",
        "/v1/messages/count_tokens",
        "/parse_function_call",
        "/separate_reasoning",
        "/model_info",
        "/get_model_info",
        "/server_info",
        "/get_server_info",
        "/openapi.json",
    }
)
MAX_ROOMS = 4096
"""Prompts of one request, times the answers to each."""
FINISH_S = 5.0
"""The answer is whole then; what reads prompts only has to end its own."""

T = TypeVar("T")
_NULL = msgspec.Raw(b"null")
_Fields = dict[str, msgspec.Raw]
_fields = msgspec.json.Decoder(_Fields).decode
_BODY_ENCODING = frozenset({b"accept-encoding"})


def way_of(fleet: Fleet, scope: Scope, body: bytes, only: Worker | None) -> Way[Answer]:
    """How a request is answered. UnsupportedFeature if a pair of workers cannot."""
    if only is not None or not fleet.has_pairs:
        return OneWorker(body, only)
    path = scope["path"]
    if path in _ONE_IS_ENOUGH:
        return OneWorker(body, kind="prefill")
    if path == "/health_generate":
        return HealthOfPair(body)
    if path not in PAIRED_PATHS:
        raise UnsupportedFeature(
            f"{path} is not served where prompts are read by other workers than those that "
            f"generate; there are {', '.join(sorted(PAIRED_PATHS))}"
        )
    return Pair(body, path)


class Pair:
    """Two workers answer: one of the type prefill, one of the type decode."""

    def __init__(self, body: bytes, path: str) -> None:
        self.body = body
        try:
            self._fields = _fields(body)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"the request's body must be a JSON object: {error}") from None
        self._num_rooms = num_rooms(path, self._fields)
        self._merges = path == "/generate" and _is_set(self._fields.get("return_logprob"))
        echoes = path == "/v1/completions" and _is_set(self._fields.get("echo"))
        if echoes and bytes(self._fields.get("logprobs", _NULL)) != b"null":
            raise UnsupportedFeature(
                "the prompt's log probabilities (echo with logprobs) are not told where prompts "
                "are read by other workers; ask /generate with return_logprob",
                param="echo",
            )

    async def attempt(self, exchange: Exchange[Any], tried: set[str]) -> Taken[Answer]:
        prefill = await exchange.choose("prefill", tried)
        decode = await exchange.choose("decode", tried)
        body = with_bootstrap(self._fields, prefill, self._num_rooms, exchange.proxy.rng)
        return await ask_both(exchange, prefill, decode, body, merges=self._merges)


@dataclass(frozen=True, slots=True)
class HealthOfPair:
    """A pair is healthy if both generate."""

    body: bytes

    async def attempt(self, exchange: Exchange[Any], tried: set[str]) -> Taken[Answer]:
        prefill = await exchange.choose("prefill", tried)
        decode = await exchange.choose("decode", tried)
        return await ask_both(exchange, prefill, decode, self.body)


async def ask_both(
    exchange: Exchange[Any], prefill: Worker, decode: Worker, body: bytes, *, merges: bool = False
) -> Taken[Answer]:
    """The second worker's answer if both have one, else that of the first that refuses.

    merges  whether the prompt's log probabilities come from the first worker's answer
    Raises  Failed
    """
    without = _BODY_ENCODING if merges else frozenset()
    loop = asyncio.get_running_loop()
    first = loop.create_task(exchange.ask(prefill, body, without=without))
    second = loop.create_task(exchange.ask(decode, body, without=without))
    asked = {first: prefill, second: decode}
    try:
        # Either one's failure ends both: without the first the second waits in vain.
        open_: set[asyncio.Task[Answer]] = {first, second}
        while open_:
            done, open_ = await asyncio.wait(open_, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.result().status >= 400:
                    return Taken(worker=asked.pop(task), answer=task.result())
        merge = None
        if merges:
            try:
                told = of_prefill(await first.result().body(MAX_BYTES))
            except WorkerFailure as error:
                exchange.no_answer(asked.pop(first), error)
                first.result().close()
                prefill.end()
                raise Failed(prefill, error) from error
            merge = PromptLogprobs(told, is_stream=is_event_stream(second.result().headers))
        reading = Reading(exchange, prefill, first.result(), second.result())
        asked.clear()
        return Taken(worker=decode, answer=second.result(), peer=reading, merge=merge)
    finally:
        _abandon(asked)


class Reading:
    """The prompt's part of a request, whose answer nobody sees, but which must succeed."""

    def __init__(
        self, exchange: Exchange[Any], worker: Worker, answer: Answer, waits: Answer
    ) -> None:
        self._exchange = exchange
        self._worker = worker
        self._answer = answer
        self._waits = waits
        self._task = asyncio.get_running_loop().create_task(self._read())
        # Not in the task: one that is cancelled before it begins runs no line.
        self._task.add_done_callback(self._give_back)

    async def finish(self) -> None:
        await asyncio.wait([self._task], timeout=FINISH_S)

    def close(self) -> None:
        self._task.cancel()

    async def _read(self) -> None:
        answer = self._answer
        try:
            while not answer.is_complete:
                answer.take()
                await answer.more()
        except WorkerFailure as error:
            self._exchange.no_answer(self._worker, error)
            self._waits.fail(PeerFailure(f"the worker that reads the prompt failed: {error}"))
        else:
            self._worker.breaker.succeeded()

    def _give_back(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self._worker.breaker.ended()
        self._answer.close()
        self._worker.end()


def _abandon(asked: Mapping[asyncio.Task[Answer], Worker]) -> None:
    """End requests whose answers are not used; those without an answer end themselves."""
    for task, worker in asked.items():
        if not task.done():
            task.cancel()
            # It may fail in this moment, and nobody else asks how it ended.
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        elif not task.cancelled() and task.exception() is None:
            worker.breaker.ended()
            task.result().close()
            worker.end()


def num_rooms(path: str, fields: Mapping[str, msgspec.Raw]) -> int | None:
    """How many sequences a request asks for; None: one, and not in a list.

    What is wrong in these fields is the workers' to refuse. InvalidRequest if there are too many.
    """
    num_prompts: int | None = None
    num_answers = 1
    if path == "/generate":
        texts, ids = fields.get("text"), fields.get("input_ids")
        num_prompts = _length(texts, of=str) or _length(ids, of=list)
        sampling = fields.get("sampling_params")
        if sampling is not None:
            num_answers = _decoded(sampling, _Sampling, otherwise=_Sampling()).n
    else:
        if path == "/v1/completions":
            prompt = fields.get("prompt")
            num_prompts = _length(prompt, of=str) or _length(prompt, of=list)
        if "n" in fields:
            num_answers = _decoded(fields["n"], int, otherwise=1)
    total = (num_prompts or 1) * max(1, num_answers)
    if total > MAX_ROOMS:
        raise InvalidRequest(
            f"the request asks for {total} sequences but may ask for at most {MAX_ROOMS}; send "
            "fewer prompts at once"
        )
    return None if num_prompts is None and total == 1 else total


def with_bootstrap(
    fields: Mapping[str, msgspec.Raw], prefill: Worker, rooms: int | None, rng: random.Random
) -> bytes:
    """The body with the place where the keys and values will be; a client's own is left out."""
    host, port = prefill.origin.host, prefill.spec.bootstrap_port
    place: dict[str, object]
    if rooms is None:
        place = {"host": host, "port": port, "room": rng.getrandbits(63)}
    else:
        numbers = [rng.getrandbits(63) for _ in range(rooms)]
        place = {"host": [host] * rooms, "port": [port] * rooms, "room": numbers}
    return msgspec.json.encode(
        {**fields, **{f"bootstrap_{name}": value for name, value in place.items()}}
    )


class _Sampling(msgspec.Struct):
    n: int = 1


def _decoded(raw: msgspec.Raw, kind: type[T], *, otherwise: T) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return otherwise


def _length(raw: msgspec.Raw | None, *, of: type[str] | type[list[object]]) -> int | None:
    """The number of prompts, if there is a list of such; None: something else is there."""
    if raw is None or bytes(memoryview(raw)[:1]) != b"[":
        return None
    items: Sequence[msgspec.Raw] = _decoded(raw, list[msgspec.Raw], otherwise=[])
    opening = b'"' if of is str else b"["
    return len(items) if items and bytes(items[0]).startswith(opening) else None


def _is_set(raw: msgspec.Raw | None) -> bool:
    """Whether a switch, or one of a list of switches, is on."""
    return raw is not None and b"true" in bytes(raw)
