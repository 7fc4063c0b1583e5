"""The methods of the services, by which servers and clients of them are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from google.protobuf.message import Message

from sapwood.rpc import health_pb2, scheduler_pb2

Asked = TypeVar("Asked", bound=Message)
Answer = TypeVar("Answer", bound=Message)

SCHEDULER = "sglang.grpc.scheduler.SglangScheduler"
HEALTH = "grpc.health.v1.Health"
MAX_ANSWER_BYTES = 256 << 20
"""Of one message: an answer may be a long prompt's log probabilities."""
KEEPALIVE_MS = 10_000
"""Pings of the other side may come this often, also while nothing else does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(Generic[Asked, Answer]):
    """One method.

    streams  whether answers come as a stream
    access   who may call it: everybody, users, or those who may steer the server
    """

    service: str = SCHEDULER
    name: str
    asked: type[Asked]
    answer: type[Answer]
    streams: bool = False
    access: Literal["open", "user", "admin"] = "user"

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


GENERATE = Method(
    name="Generate",
    asked=scheduler_pb2.GenerateRequest,
    answer=scheduler_pb2.GenerateResponse,
    streams=True,
)
EMBED = Method(name="Embed", asked=scheduler_pb2.EmbedRequest, answer=scheduler_pb2.EmbedResponse)
HEALTH_CHECK = Method(
    name="HealthCheck",
    asked=scheduler_pb2.HealthCheckRequest,
    answer=scheduler_pb2.HealthCheckResponse,
    access="open",
)
ABORT = Method(name="Abort", asked=scheduler_pb2.AbortRequest, answer=scheduler_pb2.AbortResponse)
MODEL_INFO = Method(
    name="GetModelInfo",
    asked=scheduler_pb2.GetModelInfoRequest,
    answer=scheduler_pb2.GetModelInfoResponse,
)
SERVER_INFO = Method(
    name="GetServerInfo",
    asked=scheduler_pb2.GetServerInfoRequest,
    answer=scheduler_pb2.GetServerInfoResponse,
)
LOADS = Method(
    name="GetLoads",
    asked=scheduler_pb2.GetLoadsRequest,
    answer=scheduler_pb2.GetLoadsResponse,
)
FLUSH_CACHE = Method(
    name="FlushCache",
    asked=scheduler_pb2.FlushCacheRequest,
    answer=scheduler_pb2.FlushCacheResponse,
    access="admin",
)
CHECK = Method(
    service=HEALTH,
    name="Check",
    asked=health_pb2.HealthCheckRequest,
    answer=health_pb2.HealthCheckResponse,
    access="open",
)
WATCH = Method(
    service=HEALTH,
    name="Watch",
    asked=health_pb2.HealthCheckRequest,
    answer=health_pb2.HealthCheckResponse,
    streams=True,
    access="open",
)
