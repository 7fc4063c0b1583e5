"""Weights that change while the server serves, pauses and released memory, as SGLang has them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.serving import control
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.errors import json_response
from sapwood.schema.fields import FieldTable, Int64, parse
from sapwood.schema.output import CallDone
from sapwood.schema.weights import (
    CheckWeights,
    JoinUpdateGroup,
    LeaveUpdateGroup,
    ReadWeight,
    ReleaseMemory,
    ResumeMemory,
    UpdateFromDisk,
    UpdateFromGroup,
    UpdateFromTensors,
    WeightOrder,
)

GROUP = "weight_update_group"
SEND_GROUP = "weight_send_group"


class UpdateFromDiskRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /update_weights_from_disk: reads another checkpoint of the same shapes.

    model_path          a folder, a catalogue name, or a hub repository
    load_format         as --load-format; null: what the files are
    abort_all_requests  end open requests first; if not, the update waits for those that run
    weight_version      name of the new weights, which answers have from then on
    flush_cache         forget what was computed with the old weights
    between_steps       do not wait for requests that run: they go on with the KV that they have;
                        needs flush_cache false
    """

    model_path: str
    load_format: str | None = None
    abort_all_requests: bool = False
    weight_version: str | None = None
    flush_cache: bool = True
    between_steps: bool = False


class UpdateFromTensorRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /update_weights_from_tensor: takes tensors, by their names in the checkpoint; the others
    stay as they are.

    serialized_named_tensors  base64, one entry
    load_format               what it holds. safetensors: a file's bytes. flattened_bucket: a pickle
                              of {flattened_tensor, metadata}. null or direct: a pickle of a list of
                              (name, tensor). Pickles are read without running them
    """

    serialized_named_tensors: list[str]
    load_format: Literal["safetensors", "flattened_bucket", "direct"] | None = None
    abort_all_requests: bool = False
    weight_version: str | None = None
    flush_cache: bool = True
    between_steps: bool = False


class InitGroupRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /init_weights_update_group: joins a process group whose rank 0 will send weights.

    rank_offset  this engine's rank in the group, from 1 on
    backend      gloo, or nccl where the engine computes on a GPU
    """

    master_address: str
    master_port: Int64
    rank_offset: Int64
    world_size: Int64
    group_name: str = GROUP
    backend: str = "nccl"


class UpdateFromGroupRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /update_weights_from_distributed: takes tensors that rank 0 of a group broadcasts, one
    after the other; as one tensor of bytes with load_format flattened_bucket."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[Int64]]
    group_name: str = GROUP
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None
    between_steps: bool = False
    load_format: Literal["flattened_bucket"] | None = None


class UpdateFromIpcRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /update_weights_from_ipc: refused, with the ways that there are.

    zmq_handles  where a checkpoint engine hands out the memory of each GPU"""

    zmq_handles: dict[str, str]
    flush_cache: bool = True
    weight_version: str | None = None


class InitSendGroupRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /init_weights_send_group_for_remote_instance: refused, with the ways that there are.

    ports  with commas between them, one for each rank"""

    master_address: str
    ports: str
    group_rank: Int64
    world_size: Int64
    group_name: str = SEND_GROUP
    backend: str = "nccl"


class SendWeightsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /send_weights_to_remote_instance: refused, with the ways that there are."""

    master_address: str
    ports: str
    group_name: str = SEND_GROUP


class DestroyGroupRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /destroy_weights_update_group: leaves such a group."""

    group_name: str = GROUP


class WeightVersionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /update_weight_version: names the weights that are served."""

    new_version: str
    abort_all_requests: bool = True


class ReadWeightRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /get_weights_by_name: the first rows of a weight, by its name in the checkpoint."""

    name: str
    truncate_size: Int64 = 100


class CheckerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /weights_checker: notes the weights, makes them random, or compares with what was noted.

    action  snapshot, reset_tensors or compare
    """

    action: str


class PauseRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /pause_generation: computes no more until /continue_generation.

    mode  abort: open requests end. retract: running ones wait again, and are computed anew.
          in_place: they stay as they are
    """

    mode: str = "abort"


class ContinueRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /continue_generation: goes on after a pause."""


class MemoryRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /release_memory_occupation, /resume_memory_occupation.

    tags  kv_cache, weights and cuda_graph; null: all of them
    """

    tags: list[str] | None = None


class OrderAnswer(msgspec.Struct, frozen=True):
    success: bool
    message: str


class UpdateAnswer(OrderAnswer, frozen=True):
    num_paused_requests: int


class VersionAnswer(msgspec.Struct, frozen=True):
    weight_version: str


class NewVersionAnswer(OrderAnswer, frozen=True):
    new_version: str


class PauseAnswer(msgspec.Struct, frozen=True):
    message: str
    status: str


FROM_DISK_FIELDS = FieldTable(
    title="POST /update_weights_from_disk",
    shape=UpdateFromDiskRequest,
    changes_nothing={
        "is_async": "the answer comes when the update is done",
        "torch_empty_cache": "freed memory is given back in any case",
        "keep_pause": "a pause lasts until /continue_generation",
        "recapture_cuda_graph": "recorded steps follow the weights in any case",
        "token_step": "weight_version names the weights",
    },
)
FROM_TENSOR_FIELDS = FieldTable(
    title="POST /update_weights_from_tensor", shape=UpdateFromTensorRequest
)
INIT_GROUP_FIELDS = FieldTable(title="POST /init_weights_update_group", shape=InitGroupRequest)
FROM_GROUP_FIELDS = FieldTable(
    title="POST /update_weights_from_distributed", shape=UpdateFromGroupRequest
)
FROM_IPC_FIELDS = FieldTable(title="POST /update_weights_from_ipc", shape=UpdateFromIpcRequest)
INIT_SEND_GROUP_FIELDS = FieldTable(
    title="POST /init_weights_send_group_for_remote_instance", shape=InitSendGroupRequest
)
SEND_WEIGHTS_FIELDS = FieldTable(
    title="POST /send_weights_to_remote_instance", shape=SendWeightsRequest
)
DESTROY_GROUP_FIELDS = FieldTable(
    title="POST /destroy_weights_update_group", shape=DestroyGroupRequest
)
VERSION_FIELDS = FieldTable(title="POST /update_weight_version", shape=WeightVersionRequest)
READ_FIELDS = FieldTable(title="POST /get_weights_by_name", shape=ReadWeightRequest)
CHECKER_FIELDS = FieldTable(title="POST /weights_checker", shape=CheckerRequest)
PAUSE_FIELDS = FieldTable(title="POST /pause_generation", shape=PauseRequest)
CONTINUE_FIELDS = FieldTable(title="POST /continue_generation", shape=ContinueRequest)
MEMORY_FIELDS = FieldTable(
    title="POST /release_memory_occupation, /resume_memory_occupation", shape=MemoryRequest
)


async def update_weights_from_disk(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request), FROM_DISK_FIELDS)
    order = UpdateFromDisk(path=asked.model_path, load_format=asked.load_format or "")
    return await _updated(services, order, asked)


async def update_weights_from_tensor(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request), FROM_TENSOR_FIELDS)
    form = {None: "pickle", "direct": "pickle"}.get(asked.load_format, asked.load_format)
    assert form is not None
    parts = [await asyncio.to_thread(_decoded, one) for one in asked.serialized_named_tensors]
    return await _updated(services, UpdateFromTensors(parts=parts, form=form), asked)


async def update_weights_from_distributed(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request), FROM_GROUP_FIELDS)
    order = UpdateFromGroup(
        group_name=asked.group_name,
        names=asked.names,
        dtypes=asked.dtypes,
        shapes=asked.shapes,
        is_flattened=asked.load_format is not None,
    )
    return await _updated(services, order, asked)


async def update_weights_from_ipc(request: Request, services: Services) -> Response:
    parse(await read_json(request), FROM_IPC_FIELDS)
    return _answer(CallDone("", False, control.NO_IPC))


async def init_weights_send_group_for_remote_instance(
    request: Request, services: Services
) -> Response:
    parse(await read_json(request), INIT_SEND_GROUP_FIELDS)
    return _answer(CallDone("", False, control.NO_SENDING))


async def send_weights_to_remote_instance(request: Request, services: Services) -> Response:
    parse(await read_json(request), SEND_WEIGHTS_FIELDS)
    return _answer(CallDone("", False, control.NO_SENDING))


async def init_weights_update_group(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request), INIT_GROUP_FIELDS)
    if len(services.replicas) > 1:
        raise InvalidRequest("one engine joins a group; start the server with --dp-size 1")
    order = JoinUpdateGroup(
        group_name=asked.group_name,
        master_address=asked.master_address,
        master_port=asked.master_port,
        rank=asked.rank_offset,
        world_size=asked.world_size,
        backend=asked.backend,
    )
    return _answer(await control.order_weights(services, order))


async def destroy_weights_update_group(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request, optional=True), DESTROY_GROUP_FIELDS)
    return _answer(
        await control.order_weights(services, LeaveUpdateGroup(group_name=asked.group_name))
    )


async def update_weight_version(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request), VERSION_FIELDS)
    if asked.abort_all_requests:
        for request_id in services.generator.open_ids(""):
            await services.generator.abort(request_id)
    services.served.version = asked.new_version
    message = f"the weights are {asked.new_version} now"
    return json_response({"success": True, "message": message, "new_version": asked.new_version})


async def get_weights_by_name(request: Request, services: Services) -> Response:
    """JSON numbers; of several replicas those of the first."""
    asked = parse(await read_json(request), READ_FIELDS)
    engine = services.replicas[0] if services.replicas else None
    order = ReadWeight(name=asked.name, most=asked.truncate_size)
    done = await control.order_weights(services, order, engine=engine)
    if not done.done:
        raise InvalidRequest(done.message)
    return json_response(json.loads(done.message))


async def weights_checker(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request), CHECKER_FIELDS)
    return _answer(await control.order_weights(services, CheckWeights(action=asked.action)))


async def pause_generation(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request, optional=True), PAUSE_FIELDS)
    done = await control.pause(services, asked.mode)
    if not done.done:
        raise InvalidRequest(done.message)
    return json_response({"message": done.message, "status": "ok"})


async def continue_generation(request: Request, services: Services) -> Response:
    parse(await read_json(request, optional=True), CONTINUE_FIELDS)
    done = await control.go_on(services)
    return json_response({"message": done.message, "status": "ok"})


async def release_memory_occupation(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request, optional=True), MEMORY_FIELDS)
    return await _memory(services, ReleaseMemory(tags=asked.tags or []))


async def resume_memory_occupation(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request, optional=True), MEMORY_FIELDS)
    return await _memory(services, ResumeMemory(tags=asked.tags or []))


async def _memory(services: Services, order: WeightOrder) -> Response:
    return _answer(await control.order_weights(services, order))


async def _updated(
    services: Services,
    order: WeightOrder,
    asked: UpdateFromDiskRequest | UpdateFromTensorRequest | UpdateFromGroupRequest,
) -> Response:
    done = await control.order_weights(
        services,
        order,
        flush_cache=asked.flush_cache,
        abort_all=asked.abort_all_requests,
        between_steps=asked.between_steps,
        weight_version=asked.weight_version,
    )
    num_paused = len(services.generator.open_ids("")) if services.served.is_paused else 0
    answer = {"success": done.done, "message": done.message, "num_paused_requests": num_paused}
    return json_response(answer, status=200 if done.done else 400)


def _answer(done: CallDone) -> Response:
    answer = {"success": done.done, "message": done.message}
    return json_response(answer, status=200 if done.done else 400)


def _decoded(text: str) -> bytes:
    """The bytes of base64, whose length the limit on bodies bounds."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(
            f"serialized_named_tensors has an entry that is no base64: {error}",
            param="serialized_named_tensors",
        ) from None
