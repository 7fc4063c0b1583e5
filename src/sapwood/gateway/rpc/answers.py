"""A worker's answers by gRPC, as far as they have come."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import grpc

from sapwood.base.errors import SapwoodError
from sapwood.gateway.client import ConnectionBroken, NotInTime, WorkerFailure
from sapwood.gateway.plain.refused import Refused
from sapwood.gateway.rpc.messages import Messages
from sapwood.rpc import scheduler_pb2 as pb
from sapwood.rpc.status import status_of
from sapwood.schema.output import Finish, RequestOutput, summed
from sapwood.schema.request import Generate

Stream = grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]


class GeneratedTokens:
    """The answer to Generate: a TokenAnswer, of which one message has come."""

    status = 200

    def __init__(self, call: Stream, first: pb.GenerateResponse, messages: Messages) -> None:
        self._call = call
        self._messages = messages
        self._waiting: pb.GenerateResponse | None = first
        self._idle_s: float | None = None

    async def refusal(self) -> SapwoodError | None:
        return None

    def watch(self, idle_s: float) -> None:
        self._idle_s = idle_s or None

    async def next(self) -> tuple[list[RequestOutput], int]:
        output = self._messages.output(await self._message())
        count = 1
        while output.finish is None and self._messages.may_end(output):
            output = summed([output, self._messages.output(await self._message())])
            count += 1
        return [output], count

    def close(self) -> None:
        self._call.cancel()

    async def _message(self) -> pb.GenerateResponse:
        if self._waiting is not None:
            first, self._waiting = self._waiting, None
            return first
        try:
            async with asyncio.timeout(self._idle_s) as limit:
                return await self._read()
        except TimeoutError:
            if limit.expired():
                raise NotInTime(f"nothing came for {self._idle_s:g} s") from None
            raise

    async def _read(self) -> pb.GenerateResponse:
        try:
            message: Any = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise broken(error) from error
        if message is grpc.aio.EOF:
            raise ConnectionBroken("the answer has ended without a finish_reason")
        told: pb.GenerateResponse = message
        return told


class OneOutput:
    """The answer to a request that has one output: an embedding."""

    status = 200

    def __init__(self, request: Generate, answer: pb.EmbedResponse) -> None:
        self._output = RequestOutput(
            request_id=request.request_id,
            token_ids=[],
            num_prompt_tokens=answer.prompt_tokens,
            values=packed_floats(answer.embedding),
            finish=Finish(kind="length"),
        )

    async def refusal(self) -> SapwoodError | None:
        return None

    def watch(self, idle_s: float) -> None:
        """All of it is here."""

    async def next(self) -> tuple[list[RequestOutput], int]:
        return [self._output], 1

    def close(self) -> None:
        """The call has ended."""


class RefusedCall:
    """A worker's refusal, before the first token."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.status = status_of(error.code())
        self._message = (error.details() or error.code().name)[:2000]

    async def refusal(self) -> SapwoodError | None:
        return Refused(self.status, self._message)

    def watch(self, idle_s: float) -> None:
        """All of it is here."""

    async def next(self) -> tuple[list[RequestOutput], int]:
        raise ConnectionBroken(self._message)

    def close(self) -> None:
        """The call has ended."""


def broken(error: grpc.aio.AioRpcError) -> WorkerFailure:
    return ConnectionBroken(f"{error.code().name}: {(error.details() or '')[:500]}")


def packed_floats(values: Any) -> bytes:
    """fp32, little endian."""
    return struct.pack(f"<{len(values)}f", *values)
