"""Several engines with the same model as one: each request goes to one of them, calls to all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from sapwood.base.errors import EngineUnavailable
from sapwood.engine.balance import Balancer, Load, Placement
from sapwood.engine.client import failed_output
from sapwood.schema.client import EngineClient
from sapwood.schema.output import (
    CacheFlushed,
    CallDone,
    EngineReady,
    EngineStatus,
    RequestOutput,
    total_status,
)
from sapwood.schema.request import (
    Generate,
    OrderWeights,
    RecordExperts,
    SentAdapter,
    StartProfile,
    SteerTiers,
)

log = logging.getLogger(__name__)

A = TypeVar("A")


@dataclass(eq=False)
class _Replica:
    """One engine.

    is_in  whether it has what the others have, so that it may get requests
    lacks  ids of adapters that it could not load when it came back
    """

    client: EngineClient
    load: Load
    is_in: bool = False
    lacks: set[str] = field(default_factory=set)

    @property
    def rank(self) -> int:
        return self.load.rank

    @property
    def serves(self) -> bool:
        return self.is_in and self.client.unavailable_reason is None


class ReplicatedClient:
    """Implements `schema.client.EngineClient` over engines that serve the same model.

    It serves when all engines have been ready once, and then while one of them serves. Whoever
    starts the engines says with `join` that one is ready, and with `leave` that one has failed.
    """

    def __init__(self, clients: Sequence[EngineClient], balancer: Balancer) -> None:
        self._replicas = [_Replica(client, Load(rank)) for rank, client in enumerate(clients)]
        self._balancer = balancer
        self._placed: dict[str, _Replica] = {}
        self._has_started = False
        self._ended: str | None = None
        self._adapters: dict[str, tuple[str, SentAdapter | None]] = {}
        self._changing = asyncio.Lock()
        self._joining: set[asyncio.Task[None]] = set()

    # ---- what callers use --------------------------------------------------------------------

    @property
    def info(self) -> EngineReady:
        """Of the replica that takes the shortest context, so that a prompt fits all."""
        known = [replica.client.info for replica in self._replicas if replica.is_in]
        if not known:
            raise EngineUnavailable(self.unavailable_reason or "the engines are starting")
        return min(known, key=lambda info: info.context_length)

    @property
    def unavailable_reason(self) -> str | None:
        if self._ended is not None:
            return self._ended
        reasons = {
            replica.rank: replica.client.unavailable_reason or "the engine is starting"
            for replica in self._replicas
            if not replica.serves
        }
        if not reasons or (self._has_started and len(reasons) < len(self._replicas)):
            return None
        if len(set(reasons.values())) == 1:
            return next(iter(reasons.values()))
        return "; ".join(f"replica {rank}: {reason}" for rank, reason in reasons.items())

    async def generate(self, request: Generate) -> AsyncIterator[RequestOutput]:
        try:
            replica, placement = self._place(request)
        except EngineUnavailable as error:
            yield failed_output(
                request.request_id, error.message, error.status, "ServiceUnavailableError"
            )
            return
        outputs = replica.client.generate(request)
        placement.open(request)
        self._placed[request.request_id] = replica
        try:
            async for output in outputs:
                placement.on_output(output)
                yield output
        finally:
            placement.close()
            if self._placed.get(request.request_id) is replica:
                del self._placed[request.request_id]
            if isinstance(outputs, AsyncGenerator):
                await outputs.aclose()

    async def abort(self, request_id: str) -> None:
        replica = self._placed.get(request_id)
        if replica is not None:
            await replica.client.abort(request_id)

    async def flush_cache(self) -> CacheFlushed:
        """Flush every replica; done if each of them did so."""
        answers = await self._each(lambda replica: replica.client.flush_cache())
        for replica, answer in answers:
            if answer.done:
                self._balancer.forget(replica.rank)
        return CacheFlushed("", *_summary([(one.rank, to.done, to.message) for one, to in answers]))

    async def status(self) -> EngineStatus:
        """The sum of all replicas' counters; the replicas' own are to be had from each."""
        return total_status(
            [status for _, status in await self._each(lambda replica: replica.client.status())]
        )

    async def start_profile(self, order: StartProfile) -> CallDone:
        """Each replica writes files of its own, with its rank in their names."""

        def start(replica: _Replica) -> Awaitable[CallDone]:
            name = f"{order.name}-dp{replica.rank}"
            return replica.client.start_profile(msgspec.structs.replace(order, name=name))

        return _all_done(await self._each(start))

    async def stop_profile(self) -> CallDone:
        return _all_done(await self._each(lambda replica: replica.client.stop_profile()))

    async def record_experts(self, order: RecordExperts) -> CallDone:
        """Each replica writes a file of its own, with its rank in the name."""

        def record(replica: _Replica) -> Awaitable[CallDone]:
            own = msgspec.structs.replace(order, suffix=f"{order.suffix}-dp{replica.rank}")
            return replica.client.record_experts(own)

        return _all_done(await self._each(record))

    async def freeze_gc(self) -> CallDone:
        return _all_done(await self._each(lambda replica: replica.client.freeze_gc()))

    async def slow_down(self, sleep_s: float) -> CallDone:
        return _all_done(await self._each(lambda replica: replica.client.slow_down(sleep_s)))

    async def load_adapter(
        self, adapter_id: str, path: str, sent: SentAdapter | None = None
    ) -> CallDone:
        """Load the adapter everywhere, or nowhere."""
        async with self._changing:
            answers = await self._each(
                lambda replica: replica.client.load_adapter(adapter_id, path, sent)
            )
            done = _all_done(answers)
            if done.done:
                self._adapters[adapter_id] = (path, sent)
                return done
            for replica, answer in answers:
                if answer.done:
                    await replica.client.unload_adapter(adapter_id)
            return done

    async def unload_adapter(self, adapter_id: str) -> CallDone:
        async with self._changing:
            self._adapters.pop(adapter_id, None)
            having = [one for one in self._replicas if adapter_id not in one.lacks]
            for replica in self._replicas:
                replica.lacks.discard(adapter_id)
            return _all_done(
                await self._each(lambda replica: replica.client.unload_adapter(adapter_id), having)
            )

    async def order_weights(self, order: OrderWeights) -> CallDone:
        """Every replica carries it out. One that fails where others do not has other weights: the
        answer says which."""
        return _all_done(await self._each(lambda replica: replica.client.order_weights(order)))

    async def steer_tiers(self, message: SteerTiers) -> CallDone:
        return _all_done(await self._each(lambda replica: replica.client.steer_tiers(message)))

    async def pause(self, mode: str) -> CallDone:
        return _all_done(await self._each(lambda replica: replica.client.pause(mode)))

    async def resume(self) -> CallDone:
        return _all_done(await self._each(lambda replica: replica.client.resume()))

    # ---- what the starter of the engines calls -------------------------------------------------

    def join(self, rank: int) -> None:
        """The engine of that rank is ready. It gets requests once it has the others' adapters."""
        replica = self._replicas[rank]
        self._balancer.forget(rank)
        if not self._adapters and not self._changing.locked():
            self._take_in(replica)
            return
        task = asyncio.ensure_future(self._bring_up(replica))
        self._joining.add(task)
        task.add_done_callback(self._joining.discard)

    def leave(self, rank: int) -> None:
        """The engine of that rank has failed; the client of that engine has ended its requests."""
        self._replicas[rank].is_in = False

    def end(self, reason: str) -> None:
        """No more requests are taken, because of that."""
        self._ended = reason

    @property
    def has_started(self) -> bool:
        """Whether all engines have been ready."""
        return self._has_started

    # ---- inside ------------------------------------------------------------------------------

    def _place(self, request: Generate) -> tuple[_Replica, Placement]:
        """Raises EngineUnavailable if no replica can take the request."""
        reason = self.unavailable_reason
        if reason is not None:
            raise EngineUnavailable(reason)
        asked, adapter = request.options.data_parallel_rank, request.options.adapter
        candidates = [
            replica.load
            for replica in self._replicas
            if replica.serves and adapter not in replica.lacks and asked in (None, replica.rank)
        ]
        if not candidates:
            raise EngineUnavailable(self._why_nobody(asked))
        placement = self._balancer.place(candidates, request)
        return self._replicas[placement.load.rank], placement

    def _why_nobody(self, asked: int | None) -> str:
        if asked is None:
            return "no replica that serves has the request's adapter; load the adapter again"
        reason = self._replicas[asked].client.unavailable_reason
        why = reason or "it is starting, or lacks the request's adapter"
        return f"data_parallel_rank is {asked}, but that replica does not serve: {why}"

    async def _each(
        self,
        call: Callable[[_Replica], Awaitable[A]],
        among: Sequence[_Replica] | None = None,
    ) -> list[tuple[_Replica, A]]:
        """The answers of all replicas that serve; one that fails meanwhile is left out.

        Raises EngineUnavailable if there is no answer."""
        asked = [one for one in (self._replicas if among is None else among) if one.serves]
        found = await asyncio.gather(*(call(one) for one in asked), return_exceptions=True)
        answers: list[tuple[_Replica, A]] = []
        for replica, answer in zip(asked, found, strict=True):
            if not isinstance(answer, BaseException):
                answers.append((replica, answer))
            elif not isinstance(answer, EngineUnavailable):
                raise answer
        if not answers:
            raise EngineUnavailable(self.unavailable_reason or "no replica has answered")
        return answers

    def _take_in(self, replica: _Replica) -> None:
        replica.is_in = True
        self._has_started = self._has_started or all(one.is_in for one in self._replicas)

    async def _bring_up(self, replica: _Replica) -> None:
        """Load the adapters that the other replicas have, then let requests come."""
        async with self._changing:
            replica.lacks = set()
            for adapter_id, (path, sent) in self._adapters.items():
                try:
                    done = await replica.client.load_adapter(adapter_id, path, sent)
                except EngineUnavailable:
                    return  # it has failed again
                if not done.done:
                    replica.lacks.add(adapter_id)
                    log.error("replica %d is without an adapter: %s", replica.rank, done.message)
            self._take_in(replica)


def _all_done(answers: Sequence[tuple[_Replica, CallDone]]) -> CallDone:
    return CallDone("", *_summary([(one.rank, to.done, to.message) for one, to in answers]))


def _summary(answers: Sequence[tuple[int, bool, str]]) -> tuple[bool, str]:
    """(whether all are done, what they say): the same words only once."""
    failed = [f"replica {rank}: {message}" for rank, done, message in answers if not done]
    if failed:
        return False, "; ".join(failed)
    messages = {message for _, _, message in answers}
    if len(messages) == 1:
        return True, messages.pop()
    return True, "; ".join(f"replica {rank}: {message}" for rank, _, message in answers)
