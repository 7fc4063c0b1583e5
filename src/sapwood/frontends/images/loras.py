"""Which LoRA adapters add to a model that draws: SGLang's routes /v1/set_lora and its siblings."""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest, NotFound, SapwoodError
from sapwood.frontends.images.services import PaintingServices
from sapwood.http.body import read_json
from sapwood.http.endpoints import Dialect, Endpoint
from sapwood.http.errors import OPENAI_ERRORS, json_response
from sapwood.schema.fields import FieldTable, parse
from sapwood.schema.limits import ADAPTER_NAME
from sapwood.schema.painting import LoraList, LorasAnswer, LoraWish

MAX_LORAS = 32
"""That may add at once."""
MAX_PATH = 4096
T = TypeVar("T")
Strength = Annotated[float, msgspec.Meta(ge=-1000.0, le=1000.0)]


class SetLoraRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Lists have as many entries as lora_nickname; a single value is for all of them.

    lora_path  null: the one that was given with this nickname before
    target     all, or transformer: text encoders stay as they are
    """

    lora_nickname: str | list[str]
    lora_path: str | list[str | None] | None = None
    target: str | list[str] = "all"
    strength: Strength | list[Strength] = 1.0


class MergeLoraRequest(msgspec.Struct, frozen=True, kw_only=True):
    """strength: of all that is set; null: each at the strength that it was set with"""

    target: str = "all"
    strength: Strength | None = None


class UnmergeLoraRequest(msgspec.Struct, frozen=True, kw_only=True):
    target: str = "all"


class LoraChanged(msgspec.Struct, frozen=True, kw_only=True):
    status: str
    message: str


SET_LORA_FIELDS: FieldTable[SetLoraRequest] = FieldTable(
    title="POST /v1/set_lora", shape=SetLoraRequest
)
MERGE_LORA_FIELDS: FieldTable[MergeLoraRequest] = FieldTable(
    title="POST /v1/merge_lora_weights", shape=MergeLoraRequest
)
UNMERGE_LORA_FIELDS: FieldTable[UnmergeLoraRequest] = FieldTable(
    title="POST /v1/unmerge_lora_weights", shape=UnmergeLoraRequest
)
_EXAMPLE = {"lora_nickname": "ink", "lora_path": "/models/ink.safetensors", "strength": 0.8}


def loras_dialect(services: PaintingServices) -> Dialect:
    dialect = Dialect("loras", errors={"/v1": OPENAI_ERRORS})

    @dialect.serves(
        Endpoint(
            paths=("/v1/set_lora",),
            methods=("POST",),
            access="admin",
            body=SetLoraRequest,
            example=_EXAMPLE,
            answers=(LoraChanged,),
        )
    )
    async def post_set_lora(request: Request) -> Response:
        wishes = wishes_of(parse(await read_json(request), SET_LORA_FIELDS))
        names = ", ".join(wish.nickname for wish in wishes)
        return _answer(await services.engine.change_loras("set", wishes=wishes), f"set: {names}")

    @dialect.serves(
        Endpoint(
            paths=("/v1/merge_lora_weights",),
            methods=("POST",),
            access="admin",
            body=MergeLoraRequest,
            is_body_required=False,
            example={"target": "all", "strength": 0.5},
            answers=(LoraChanged,),
        )
    )
    async def post_merge_lora_weights(request: Request) -> Response:
        asked = parse(await read_json(request, optional=True), MERGE_LORA_FIELDS)
        return _answer(
            await services.engine.change_loras(
                "merge", target=asked.target, strength=asked.strength
            ),
            "what was set adds again",
        )

    @dialect.serves(
        Endpoint(
            paths=("/v1/unmerge_lora_weights",),
            methods=("POST",),
            access="admin",
            body=UnmergeLoraRequest,
            is_body_required=False,
            example={"target": "all"},
            answers=(LoraChanged,),
        )
    )
    async def post_unmerge_lora_weights(request: Request) -> Response:
        asked = parse(await read_json(request, optional=True), UNMERGE_LORA_FIELDS)
        changed = await services.engine.change_loras("unmerge", target=asked.target)
        return _answer(changed, "nothing adds any more")

    @dialect.serves(
        Endpoint(paths=("/v1/list_loras",), methods=("GET",), access="user", answers=(LoraList,))
    )
    async def get_list_loras(request: Request) -> Response:
        found = await services.engine.list_loras()
        return json_response(msgspec.to_builtins(found.listing))

    return dialect


def wishes_of(asked: SetLoraRequest) -> tuple[LoraWish, ...]:
    """InvalidRequest names the list of another length, and the limit that is exceeded."""
    single = isinstance(asked.lora_nickname, str)
    names = [asked.lora_nickname] if isinstance(asked.lora_nickname, str) else asked.lora_nickname
    if not 1 <= len(names) <= MAX_LORAS:
        raise InvalidRequest(
            f"lora_nickname has {len(names)} names but must have 1 to {MAX_LORAS}",
            param="lora_nickname",
        )
    if len(set(names)) < len(names):
        raise InvalidRequest("lora_nickname has a name twice", param="lora_nickname")
    for name in names:
        ADAPTER_NAME.check(len(name), "lora_nickname")
    paths = asked.lora_path
    if isinstance(paths, str) and not single:
        raise InvalidRequest(
            "lora_path must be a list as lora_nickname is one: each name has a path of its own",
            param="lora_path",
        )
    own_paths = _each(paths, len(names), "lora_path")
    for path in own_paths:
        if path is not None and not (0 < len(path) <= MAX_PATH and "\0" not in path):
            raise InvalidRequest(
                f"lora_path must have 1 to {MAX_PATH} characters", param="lora_path"
            )
    return tuple(
        LoraWish(nickname=name, path=path, target=target, strength=strength)
        for name, path, target, strength in zip(
            names,
            own_paths,
            _each(asked.target, len(names), "target"),
            _each(asked.strength, len(names), "strength"),
            strict=True,
        )
    )


def _each(value: T | list[T], count: int, name: str) -> list[T]:
    """One value per name."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(
            f"{name} has {len(value)} entries, but lora_nickname has {count}", param=name
        )
    return value


def _answer(found: LorasAnswer, message: str) -> Response:
    if found.refusal is not None:
        kind: type[SapwoodError] = NotFound if found.status == 404 else InvalidRequest
        raise kind(found.refusal, param=found.param)
    return json_response({"status": "ok", "message": f"LoRA {message}"})
