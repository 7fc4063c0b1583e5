"""The endpoints about weights, pauses and memory, as a table."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import Request, Response

from sapwood.frontends.native import settings, weights
from sapwood.frontends.serving.services import Services
from sapwood.http.endpoints import Dialect, Endpoint, EndpointRows
from sapwood.http.errors import json_response

Handler = Callable[[Request, Services], Coroutine[Any, Any, Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An endpoint for admins, whose path is the handler's name.

    body      its fields; has_default: an empty body means all of their defaults
    refusals  whether a refusal comes as the answer, with success false
    also_get  whether GET does the same, as SGLang's does
    """

    handler: Handler
    body: type[msgspec.Struct]
    example: dict[str, Any]
    answer: Any = weights.OrderAnswer
    refusals: bool = True
    has_default: bool = False
    also_get: bool = False

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(
            paths=(f"/{self.handler.__name__}",),
            methods=("GET", "POST") if self.also_get else ("POST",),
            access="admin",
            body=self.body,
            is_body_required=not self.has_default,
            example=self.example,
            answers=(self.answer,),
            refusal=self.answer if self.refusals else None,
        )


ROWS = (
    Row(
        handler=weights.update_weights_from_disk,
        body=weights.UpdateFromDiskRequest,
        example={"model_path": "/models/step-2"},
        answer=weights.UpdateAnswer,
    ),
    Row(
        handler=weights.update_weights_from_tensor,
        body=weights.UpdateFromTensorRequest,
        example={"serialized_named_tensors": ["gAR9lC4="]},
        answer=weights.UpdateAnswer,
    ),
    Row(
        handler=weights.init_weights_update_group,
        body=weights.InitGroupRequest,
        example={
            "master_address": "10.0.0.1",
            "master_port": 29500,
            "rank_offset": 1,
            "world_size": 2,
        },
    ),
    Row(
        handler=weights.update_weights_from_distributed,
        body=weights.UpdateFromGroupRequest,
        example={"names": ["model.norm.weight"], "dtypes": ["bfloat16"], "shapes": [[576]]},
        answer=weights.UpdateAnswer,
    ),
    Row(
        handler=weights.update_weights_from_ipc,
        body=weights.UpdateFromIpcRequest,
        example={"zmq_handles": {"GPU-0": "ipc:///tmp/weights"}},
    ),
    Row(
        handler=weights.init_weights_send_group_for_remote_instance,
        body=weights.InitSendGroupRequest,
        example={
            "master_address": "10.0.0.1",
            "ports": "29501",
            "group_rank": 0,
            "world_size": 2,
        },
    ),
    Row(
        handler=weights.send_weights_to_remote_instance,
        body=weights.SendWeightsRequest,
        example={"master_address": "10.0.0.1", "ports": "29501"},
    ),
    Row(
        handler=weights.destroy_weights_update_group,
        body=weights.DestroyGroupRequest,
        example={"group_name": "weight_update_group"},
        has_default=True,
    ),
    Row(
        handler=weights.update_weight_version,
        body=weights.WeightVersionRequest,
        example={"new_version": "step-2"},
        answer=weights.NewVersionAnswer,
    ),
    Row(
        handler=weights.get_weights_by_name,
        body=weights.ReadWeightRequest,
        example={"name": "model.norm.weight"},
        answer=list[Any],
        refusals=False,
        also_get=True,
    ),
    Row(
        handler=weights.weights_checker,
        body=weights.CheckerRequest,
        example={"action": "snapshot"},
    ),
    Row(
        handler=weights.pause_generation,
        body=weights.PauseRequest,
        example={"mode": "retract"},
        answer=weights.PauseAnswer,
        refusals=False,
        has_default=True,
    ),
    Row(
        handler=weights.continue_generation,
        body=weights.ContinueRequest,
        example={},
        answer=weights.PauseAnswer,
        refusals=False,
        has_default=True,
    ),
    *(
        Row(
            handler=handler,
            body=weights.MemoryRequest,
            example={"tags": ["kv_cache"]},
            has_default=True,
            also_get=True,
        )
        for handler in (weights.release_memory_occupation, weights.resume_memory_occupation)
    ),
)


def weight_dialect(services: Services) -> Dialect:
    rows: EndpointRows[Services] = EndpointRows()
    for row in ROWS:
        rows.serves(row.endpoint)(row.handler)
    rows.serves(
        Endpoint(
            paths=("/set_internal_state",),
            methods=("POST", "PUT"),
            access="admin",
            body=settings.SettingsRequest,
            example={"server_args": {"stream_interval": 8}},
            answers=(list[bool],),
        )
    )(settings.set_internal_state)
    rows.serves(
        Endpoint(
            paths=("/weight_version", "/get_weight_version"),
            methods=("GET",),
            access="user",
            answers=(weights.VersionAnswer,),
        )
    )(weight_version)
    return rows.dialect("weights", services)


async def weight_version(request: Request, services: Services) -> Response:
    return json_response({"weight_version": services.served.version})
