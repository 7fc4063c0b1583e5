"""The methods of the service over the server's own services: translation, and nothing else."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from google.protobuf.json_format import ParseDict

from sapwood.base.errors import InvalidRequest, NotFound
from sapwood.frontends.grpc.answer import SampleAnswer
from sapwood.frontends.grpc.request import embed_request, text_request
from sapwood.frontends.observability.loads import all_loads
from sapwood.frontends.serving.embed import embed_all
from sapwood.frontends.serving.engine_figures import EngineFigures
from sapwood.frontends.serving.generate import generate
from sapwood.frontends.serving.services import Services
from sapwood.rpc import health_pb2
from sapwood.rpc import scheduler_pb2 as pb
from sapwood.rpc.methods import SCHEDULER

WATCH_S = 0.5
"""How soon those who watch the health hear of a change."""


class SchedulerService:
    """Answers the methods. Errors are SapwoodError, as everywhere.

    eos_token_ids  ids that end the model's outputs
    """

    def __init__(self, services: Services, eos_token_ids: tuple[int, ...] = ()) -> None:
        self._services = services
        self._eos = eos_token_ids
        self._figures = services.figures or EngineFigures(
            services.replicas or (services.engine,), services.observer
        )
        self._ends = asyncio.Event()

    async def generate(
        self, asked: pb.GenerateRequest
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Closing the generator aborts the request, as a call that is cancelled does."""
        services = self._services
        request = text_request(asked, services)
        samples = [SampleAnswer(request, i, stream=asked.stream) for i in range(request.n)]
        made = generate(services, [request], keeps_logprobs=not asked.stream)
        async with aclosing(made) as chunks:
            async for _, chunk in chunks:
                for message in await samples[chunk.index].messages(chunk):
                    yield message

    async def embed(self, asked: pb.EmbedRequest) -> pb.EmbedResponse:
        (output,) = await embed_all(self._services, [embed_request(asked, self._services)])
        return pb.EmbedResponse(
            embedding=output.values,
            embedding_dim=len(output.values),
            prompt_tokens=output.num_prompt_tokens,
        )

    async def health_check(self, asked: pb.HealthCheckRequest) -> pb.HealthCheckResponse:
        reason = self._services.engine.unavailable_reason
        return pb.HealthCheckResponse(healthy=reason is None, message=reason or "ok")

    async def abort(self, asked: pb.AbortRequest) -> pb.AbortResponse:
        id_, generator = asked.request_id, self._services.generator
        if not id_:
            raise InvalidRequest("request_id is empty; name a request", param="request_id")
        is_open = id_ in generator.open_ids(id_)
        await generator.abort(id_)
        message = "aborted" if is_open else "no open request has this id"
        return pb.AbortResponse(success=is_open, message=message)

    async def flush_cache(self, asked: pb.FlushCacheRequest) -> pb.FlushCacheResponse:
        if asked.timeout_s:
            raise InvalidRequest(
                "timeout_s must be 0: the cache is flushed at once, or not at all while requests "
                "run; ask again later",
                param="timeout_s",
            )
        flushed = await self._services.engine.flush_cache()
        return pb.FlushCacheResponse(success=flushed.done, message=flushed.message)

    async def model_info(self, asked: pb.GetModelInfoRequest) -> pb.GetModelInfoResponse:
        services = self._services
        info, tokenizer, pooling = services.engine.info, services.tokenizer, services.pooling
        labels = () if pooling is None else pooling.labels
        defaults = json.dumps(dict(services.default_sampling)) if services.default_sampling else ""
        return pb.GetModelInfoResponse(
            model_path=services.model_path,
            tokenizer_path=services.tokenizer_path or services.model_path,
            is_generation=pooling is None,
            preferred_sampling_params=defaults,
            default_sampling_params_json=defaults,
            weight_version=services.served.version,
            served_model_name=services.model_name,
            max_context_length=info.context_length,
            max_req_input_len=info.context_length - 1,
            vocab_size=services.generator.vocab_size,
            model_type=services.model_type or "",
            architectures=services.architectures,
            eos_token_ids=self._eos,
            bos_token_id=tokenizer.bos_token_id or 0,
            num_labels=len(labels),
            id2label_json=json.dumps(dict(enumerate(labels))) if labels else "",
        )

    async def server_info(self, asked: pb.GetServerInfoRequest) -> pb.GetServerInfoResponse:
        services = self._services
        info = services.engine.info
        told = pb.GetServerInfoResponse(
            active_requests=len(services.generator.open_ids("")),
            uptime_seconds=time.time() - services.created,
            sglang_version=services.version,
            server_type="grpc",
            max_total_num_tokens=info.max_total_tokens,
        )
        told.start_time.FromSeconds(services.created)
        told.server_args.update(_plain({**services.options, **info.options}))
        told.scheduler_info.update(
            _plain(
                {
                    "max_total_num_tokens": info.max_total_tokens,
                    "max_req_input_len": info.context_length - 1,
                    "max_running_requests": info.max_running_requests,
                    "page_size": info.page_size,
                    "ranks": info.ranks,
                    "notes": [*info.notes, *map(str, services.formats.decisions)],
                }
            )
        )
        return told

    async def loads(self, asked: pb.GetLoadsRequest) -> pb.GetLoadsResponse:
        rank = str(asked.dp_rank) if asked.HasField("dp_rank") else None
        told = await all_loads(self._services, self._figures, list(asked.include), rank)
        return ParseDict(told, pb.GetLoadsResponse(), ignore_unknown_fields=True)

    async def check(self, asked: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
        if asked.service not in ("", SCHEDULER):
            raise NotFound(f"there is no service {asked.service[:200]!r} here, only {SCHEDULER}")
        return self._status()

    async def watch(
        self, asked: health_pb2.HealthCheckRequest
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """The status now, and whenever it has changed, until the server ends."""
        is_known = asked.service in ("", SCHEDULER)
        unknown = health_pb2.HealthCheckResponse(
            status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        )
        told = None
        while not self._ends.is_set():
            status = self._status() if is_known else unknown
            if status != told:
                told = status
                yield status
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ends.wait(), WATCH_S)

    def end(self) -> None:
        """End the streams that would go on for as long as the server."""
        self._ends.set()

    def _status(self) -> health_pb2.HealthCheckResponse:
        is_well = self._services.engine.unavailable_reason is None
        status = health_pb2.HealthCheckResponse
        return status(status=status.SERVING if is_well else status.NOT_SERVING)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As a Struct takes them."""
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(values))
    return plain
