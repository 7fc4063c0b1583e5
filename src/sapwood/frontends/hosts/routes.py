"""SageMaker's /ping and /invocations, and Vertex's predict route.

Source: SageMaker's and Vertex AI's requirements of custom containers; parity with SGLang 0.5.8.
"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Request, Response

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.frontends.native import admin
from sapwood.frontends.native.answer_shapes import HealthAnswer
from sapwood.frontends.native.generate import in_session, whole_answers
from sapwood.frontends.native.protocol import GENERATE_FIELDS
from sapwood.frontends.openai.answer_shapes import ChatAnswer
from sapwood.frontends.openai.chat import chat_completions
from sapwood.frontends.openai.protocol import ChatRequest
from sapwood.frontends.openai.routes import CHAT_EXAMPLE
from sapwood.frontends.serving.services import Services
from sapwood.http.body import read_json
from sapwood.http.endpoints import Dialect, Endpoint
from sapwood.http.errors import OPENAI_ERRORS, json_response
from sapwood.http.openapi import SSE
from sapwood.http.sse import until_disconnect
from sapwood.schema.fields import FieldTable, parse
from sapwood.schema.unsupported import refuse


class VertexRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /vertex_generate.

    instances   each with text, input_ids or input_embeds, as /generate takes them
    parameters  the other fields of /generate, sampling_params among them
    """

    instances: list[dict[str, Any]]
    parameters: dict[str, Any] = {}


VERTEX_FIELDS = FieldTable(title="POST /vertex_generate", shape=VertexRequest)


class VertexAnswer(msgspec.Struct, frozen=True, kw_only=True):
    predictions: list[dict[str, Any]]


def hosts_dialect(services: Services) -> Dialect:
    dialect = Dialect("hosts")

    # Probes bring no keys.
    @dialect.serves(
        Endpoint(paths=("/ping",), methods=("GET",), access="open", answers=(HealthAnswer,))
    )
    async def get_ping(request: Request) -> Response:
        return admin.health(services)

    @dialect.serves(
        Endpoint(
            paths=("/invocations",),
            methods=("POST",),
            access="user",
            errors=OPENAI_ERRORS,
            body=ChatRequest,
            example=CHAT_EXAMPLE,
            answers=(ChatAnswer, SSE),
        )
    )
    async def post_invocations(request: Request) -> Response:
        return await chat_completions(request, services)

    @dialect.serves(
        Endpoint(
            paths=("/vertex_generate",),
            methods=("POST",),
            access="user",
            body=VertexRequest,
            example={
                "instances": [{"text": "The oak is"}],
                "parameters": {"sampling_params": {"max_new_tokens": 16}},
            },
            answers=(VertexAnswer,),
        )
    )
    async def post_vertex(request: Request) -> Response:
        return await vertex_generate(request, services)

    return dialect


async def vertex_generate(request: Request, services: Services) -> Response:
    """Answer like /generate: instances are the prompts of a batch, parameters its other fields."""
    started_s = services.clock.now_s()
    asked = parse(await read_json(request), VERTEX_FIELDS)
    body = {**asked.parameters, **_prompts(asked.instances)}
    batch_request = parse(body, GENERATE_FIELDS, where="parameters")
    if batch_request.stream:
        refuse(
            UnsupportedFeature(
                "parameters.stream is not possible here; use /generate", param="parameters.stream"
            )
        )
    batch = await in_session(batch_request, services)
    answers = await until_disconnect(whole_answers(services, batch, started_s), request.receive)
    return json_response({"predictions": answers})


def _prompts(instances: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The field of /generate that takes the instances' prompts, with these prompts."""
    if not instances:
        raise InvalidRequest("instances is empty; send at least one", param="instances")
    names = {name for instance in instances for name in instance}
    if len(names) != 1 or not names <= {"text", "input_ids", "input_embeds"}:
        raise InvalidRequest(
            "each of instances must have the same one of the fields text, input_ids and "
            "input_embeds, and no other",
            param="instances",
        )
    (name,) = names
    missing = [i for i, instance in enumerate(instances) if name not in instance]
    if missing:
        raise InvalidRequest(f"instances[{missing[0]}].{name} is required", param="instances")
    return {name: [instance[name] for instance in instances]}
