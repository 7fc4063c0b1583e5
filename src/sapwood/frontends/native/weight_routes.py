"""The endpoints about weights, pauses and memory, as a table."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from sapwood.frontends.native import weights
from sapwood.frontends.serving.services import Services
from sapwood.http.endpoints import Dialect, Endpoint
from sapwood.http.errors import json_response


def weight_dialect(services: Services) -> Dialect:
    dialect = Dialect("weights")

    @dialect.serves(
        Endpoint(
            paths=("/update_weights_from_disk",),
            methods=("POST",),
            access="admin",
            body=weights.UpdateFromDiskRequest,
            example={"model_path": "/models/step-2"},
            answers=(weights.UpdateAnswer,),
            refusal=weights.UpdateAnswer,
        )
    )
    async def update_weights_from_disk(request: Request) -> Response:
        return await weights.update_from_disk(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/update_weights_from_tensor",),
            methods=("POST",),
            access="admin",
            body=weights.UpdateFromTensorRequest,
            example={"serialized_named_tensors": ["gAR9lC4="]},
            answers=(weights.UpdateAnswer,),
            refusal=weights.UpdateAnswer,
        )
    )
    async def update_weights_from_tensor(request: Request) -> Response:
        return await weights.update_from_tensor(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/init_weights_update_group",),
            methods=("POST",),
            access="admin",
            body=weights.InitGroupRequest,
            example={
                "master_address": "10.0.0.1",
                "master_port": 29500,
                "rank_offset": 1,
                "world_size": 2,
            },
            answers=(weights.OrderAnswer,),
            refusal=weights.OrderAnswer,
        )
    )
    async def init_weights_update_group(request: Request) -> Response:
        return await weights.init_group(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/update_weights_from_distributed",),
            methods=("POST",),
            access="admin",
            body=weights.UpdateFromGroupRequest,
            example={
                "names": ["model.norm.weight"],
                "dtypes": ["bfloat16"],
                "shapes": [[576]],
            },
            answers=(weights.UpdateAnswer,),
            refusal=weights.UpdateAnswer,
        )
    )
    async def update_weights_from_distributed(request: Request) -> Response:
        return await weights.update_from_group(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/destroy_weights_update_group",),
            methods=("POST",),
            access="admin",
            body=weights.DestroyGroupRequest,
            is_body_required=False,
            example={"group_name": "weight_update_group"},
            answers=(weights.OrderAnswer,),
            refusal=weights.OrderAnswer,
        )
    )
    async def destroy_weights_update_group(request: Request) -> Response:
        return await weights.destroy_group(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/update_weight_version",),
            methods=("POST",),
            access="admin",
            body=weights.WeightVersionRequest,
            example={"new_version": "step-2"},
            answers=(weights.NewVersionAnswer,),
            refusal=weights.NewVersionAnswer,
        )
    )
    async def update_weight_version(request: Request) -> Response:
        return await weights.update_version(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/get_weights_by_name",),
            methods=("GET", "POST"),
            access="admin",
            body=weights.ReadWeightRequest,
            example={"name": "model.norm.weight"},
            answers=(list[Any],),
        )
    )
    async def get_weights_by_name(request: Request) -> Response:
        return await weights.read_weight(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/weights_checker",),
            methods=("POST",),
            access="admin",
            body=weights.CheckerRequest,
            example={"action": "snapshot"},
            answers=(weights.OrderAnswer,),
            refusal=weights.OrderAnswer,
        )
    )
    async def weights_checker(request: Request) -> Response:
        return await weights.check(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/pause_generation",),
            methods=("POST",),
            access="admin",
            body=weights.PauseRequest,
            is_body_required=False,
            example={"mode": "retract"},
            answers=(weights.PauseAnswer,),
        )
    )
    async def pause_generation(request: Request) -> Response:
        return await weights.pause(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/continue_generation",),
            methods=("POST",),
            access="admin",
            body=weights.ContinueRequest,
            is_body_required=False,
            example={},
            answers=(weights.PauseAnswer,),
        )
    )
    async def continue_generation(request: Request) -> Response:
        return await weights.go_on(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/release_memory_occupation",),
            methods=("GET", "POST"),
            access="admin",
            body=weights.MemoryRequest,
            is_body_required=False,
            example={"tags": ["kv_cache"]},
            answers=(weights.OrderAnswer,),
            refusal=weights.OrderAnswer,
        )
    )
    async def release_memory_occupation(request: Request) -> Response:
        return await weights.release_memory(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/resume_memory_occupation",),
            methods=("GET", "POST"),
            access="admin",
            body=weights.MemoryRequest,
            is_body_required=False,
            example={"tags": ["kv_cache"]},
            answers=(weights.OrderAnswer,),
            refusal=weights.OrderAnswer,
        )
    )
    async def resume_memory_occupation(request: Request) -> Response:
        return await weights.resume_memory(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/weight_version", "/get_weight_version"),
            methods=("GET",),
            access="user",
            answers=(weights.VersionAnswer,),
        )
    )
    async def weight_version(request: Request) -> Response:
        return json_response({"weight_version": services.served.version})

    return dialect
