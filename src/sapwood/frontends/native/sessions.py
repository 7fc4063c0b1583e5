"""Sessions of /generate, and the endpoints that open and close them, as SGLang has them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
from fastapi import Request, Response

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.native.answer_shapes import Done
from sapwood.frontends.native.protocol import SESSION_FIELDS
from sapwood.frontends.serving.services import Services
from sapwood.frontends.serving.sessions import SessionParams, Turn
from sapwood.http.body import read_json
from sapwood.http.endpoints import Dialect, Endpoint, EndpointRows
from sapwood.http.errors import json_response
from sapwood.schema.fields import FieldTable, parse
from sapwood.text.generation import TextRequest

ROWS: EndpointRows[Services] = EndpointRows()


class OpenSessionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /open_session: the answer is the session's id, which requests name.

    session_id  an id of the client's own; null: a random one
    """

    session_id: str | None = None


class CloseSessionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /close_session: forgets a session. Its requests that run go on."""

    session_id: str


OPEN_SESSION_FIELDS = FieldTable(
    title="POST /open_session",
    shape=OpenSessionRequest,
    changes_nothing={
        "capacity_of_str_len": "the context length bounds a session's prompts, as SGLang's do"
    },
)
CLOSE_SESSION_FIELDS = FieldTable(title="POST /close_session", shape=CloseSessionRequest)


def session_dialect(services: Services) -> Dialect:
    return ROWS.dialect("sessions", services)


@ROWS.serves(
    Endpoint(
        paths=("/open_session",),
        methods=("GET", "POST"),
        access="user",
        get_has_effect=True,
        body=OpenSessionRequest,
        is_body_required=False,
        example={},
        answers=(str,),
    )
)
async def open_session(request: Request, services: Services) -> Response:
    asked = parse(await read_json(request, optional=True), OPEN_SESSION_FIELDS)
    return json_response(services.sessions.open(asked.session_id))


@ROWS.serves(
    Endpoint(
        paths=("/close_session",),
        methods=("GET", "POST"),
        access="user",
        get_has_effect=True,
        body=CloseSessionRequest,
        example={"session_id": "my-session"},
        answers=(Done,),
    )
)
async def close_session(request: Request, services: Services) -> Response:
    """200 also if there is no such session, as in SGLang."""
    asked = parse(await read_json(request), CLOSE_SESSION_FIELDS)
    was_open = services.sessions.close(asked.session_id)
    message = "the session is closed" if was_open else "there was no such session"
    return json_response({"success": True, "message": message})


async def in_sessions(
    requests: list[TextRequest], fields: list[tuple[Any, str]], services: Services
) -> list[TextRequest]:
    """The same requests with whole prompts: each goes on from the turn that its fields name.

    fields  (session_params, their path in the body) of each request
    Raises  InvalidRequest, which names the field; no request has begun then"""
    found: list[TextRequest] = []
    turns: list[Turn] = []
    try:
        for request, (given, where) in zip(requests, fields, strict=True):
            params = _params(given, where)
            if params is None:
                found.append(request)
                continue
            turns.append(await _turn(request, params, services))
            found.append(replace(request, prompt=turns[-1].prompt_ids(), turn=turns[-1]))
    except BaseException:
        for turn in turns:
            turn.ended()
        raise
    return found


def _params(given: Any, where: str) -> SessionParams | None:
    fields = parse(given, SESSION_FIELDS, where=where)
    if fields.id is None:
        return None
    return SessionParams(
        session_id=fields.id,
        request_id=fields.rid,
        offset=fields.offset or 0,
        replaces=fields.replace,
        drops_output=fields.drop_previous_output,
    )


async def _turn(request: TextRequest, params: SessionParams, services: Services) -> Turn:
    if request.n > 1 or request.input_embeds or request.media:
        raise InvalidRequest(
            "a request of a session has one sample, and a text or token ids", param="session_params"
        )
    prompt = request.prompt
    ids = prompt if isinstance(prompt, list) else await services.generator.encode(prompt, True)
    turn, stopped = services.sessions.begin(
        params, request.request_id, ids, bos=services.tokenizer.bos_token_id
    )
    for one in stopped:
        await services.generator.abort(one.request_id)
    return turn
