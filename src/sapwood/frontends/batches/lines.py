"""The lines of an offline batch: how requests are read, and how answers are written.

    native  {"id", "prompt" or "messages", "sampling_params"}
            -> {"id", "text", "output_ids", "meta_info", "error"}, as /generate answers
    OpenAI  {"custom_id", "method", "url", "body"}
            -> {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}

Either becomes a POST to the same application that serves HTTP, so that a line and a request with
the same body get the same answer.
Source: OpenAI's Batch API reference.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import orjson

from sapwood.base.errors import InvalidRequest, SapwoodError, UnsupportedFeature
from sapwood.frontends.serving.services import Services
from sapwood.http.body import parse_object
from sapwood.http.errors import openai_body
from sapwood.schema.fields import FieldTable, parse
from sapwood.schema.limits import LINE_ID

BATCH_URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
"""The routes of OpenAI's API that a batch may call."""

OPENAI_URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
"""The same without responses: the command `sapwood generate` has nowhere to keep conversations."""

NATIVE_URL = "/generate"

_MARKS = frozenset({"custom_id", "method", "url", "body"})
"""Any of these keys makes a line one of OpenAI's."""


class OpenAiLine(msgspec.Struct, frozen=True, kw_only=True):
    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


class NativeLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line in sapwood's own format. A line without an id is identified by its number."""

    id: str | int | None = None
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    sampling_params: dict[str, Any] = {}


OPENAI_LINE_FIELDS = FieldTable(title="a line of a batch, as OpenAI has it", shape=OpenAiLine)
NATIVE_LINE_FIELDS = FieldTable(title="a line of a batch, in sapwood's form", shape=NativeLine)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line.

    number  the line's place in the input, from 1
    name    the id in the answer: the line's own, or "line-N" if it has none
    given   the line's JSON object; empty if the line is none, and then `error` says so
    error   why the line cannot be answered; None: it can
    """

    number: int
    name: str | int
    given: Mapping[str, Any]
    error: SapwoodError | None = None

    @property
    def key(self) -> str:
        """The name as text: the answer to this line has the same key."""
        return str(self.name)

    @property
    def is_openai(self) -> bool:
        return not _MARKS.isdisjoint(self.given)

    def refused(self, error: SapwoodError) -> Line:
        """The line with an error, and without its id, which an earlier line has too."""
        return replace(self, name=_numbered(self.number), error=error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer to a line.

    answer             the object to write to the output
    num_output_tokens  output tokens of all samples
    has_failed         whether the answer is an error
    usage              the answer's own usage field; empty if it has none
    """

    answer: dict[str, Any]
    num_output_tokens: int
    has_failed: bool
    usage: Mapping[str, Any] = field(default_factory=dict)

    @property
    def encoded(self) -> bytes:
        return orjson.dumps(self.answer) + b"\n"


def read_line(raw: bytes, number: int) -> Line:
    """Parse one line of the input. Never raises: the line's `error` describes any problem."""
    try:
        given = parse_object(raw)
    except InvalidRequest as error:
        told = InvalidRequest(error.message.replace("the request's body", "the line"))
        return Line(number=number, name=_numbered(number), given={}, error=told)
    name = given.get("id" if _MARKS.isdisjoint(given) else "custom_id")
    if not isinstance(name, str | int):
        name = _numbered(number)
    if isinstance(name, str) and len(name) > LINE_ID.most:
        told = InvalidRequest(
            f"the line's id has {len(name)} characters but at most {LINE_ID.most} are accepted"
        )
        kept = dict.fromkeys(_MARKS & given.keys())
        return Line(number=number, name=_numbered(number), given=kept, error=told)
    return Line(number=number, name=name, given=given)


def key_of_answer(answer: dict[str, Any]) -> str | None:
    """The key of the input line to which this line of the output is the answer."""
    name = answer.get("custom_id")
    if name is None:
        name = answer.get("id")
    return str(name) if isinstance(name, str | int) else None


def is_failure(answer: dict[str, Any]) -> bool:
    response = answer.get("response")
    is_refused = isinstance(response, dict) and response.get("status_code") != 200
    return answer.get("error") is not None or is_refused


def to_post(line: Line, services: Services) -> tuple[str, dict[str, Any]]:
    """(path, body) of the request in the line; raises SapwoodError if there is none."""
    if line.error is not None:
        raise line.error
    if line.is_openai:
        return openai_post(line.given)
    return _native_post(line.given, services)


def reply(line: Line, status: int, content: bytes) -> Reply:
    """The reply to a line, made from the application's status and body."""
    body = orjson.loads(content)
    answer: dict[str, Any]
    if line.is_openai:
        answer = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": line.name,
            "response": {"status_code": status, "request_id": uuid.uuid4().hex, "body": body},
            "error": None,
        }
    elif status != 200:
        answer = {"id": line.name, "error": body["error"]}
    elif isinstance(body, list):
        answer = {"id": line.name, "samples": body, "error": None}
    else:
        answer = {"id": line.name, **body, "error": None}
    if status != 200:
        return Reply(answer=answer, num_output_tokens=0, has_failed=True)
    usage = body.get("usage") or {} if isinstance(body, dict) else {}
    return Reply(answer=answer, num_output_tokens=_count(body), has_failed=False, usage=usage)


def refusal(line: Line, error: SapwoodError, code: str = "invalid_line") -> Reply:
    """The reply to a line that never became a request."""
    answer: dict[str, Any]
    if line.is_openai:
        answer = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": line.name,
            "response": None,
            "error": {"code": code, "message": f"line {line.number}: {error.message}"},
        }
    else:
        body = {**openai_body(error), "message": f"line {line.number}: {error.message}"}
        answer = {"id": line.name, "error": body}
    return Reply(answer=answer, num_output_tokens=0, has_failed=True)


def openai_post(
    given: Mapping[str, Any], urls: Sequence[str] = OPENAI_URLS
) -> tuple[str, dict[str, Any]]:
    """(path, body) of a line in OpenAI's format; the path must be one of `urls`.

    Raises InvalidRequest or UnsupportedFeature.
    """
    line = parse(given, OPENAI_LINE_FIELDS)
    if line.method != "POST":
        raise InvalidRequest(f"method is {line.method!r} but must be 'POST'", param="method")
    if line.url not in urls:
        raise UnsupportedFeature(
            f"url is {line.url!r} but must be one of: {', '.join(urls)}", param="url"
        )
    for name in ("stream", "background"):
        if line.body.get(name):
            raise InvalidRequest(f"body.{name} has no place in a batch; leave it out", param=name)
    return line.url, line.body


def _native_post(given: Mapping[str, Any], services: Services) -> tuple[str, dict[str, Any]]:
    line = parse(given, NATIVE_LINE_FIELDS)
    if (line.prompt is None) == (line.messages is None):
        raise InvalidRequest("exactly one of prompt and messages is required", param="prompt")
    body: dict[str, Any] = {"sampling_params": line.sampling_params}
    if isinstance(line.prompt, str):
        return NATIVE_URL, {**body, "text": line.prompt}
    if line.prompt is not None:
        return NATIVE_URL, {**body, "input_ids": line.prompt}
    if services.template is None:
        raise UnsupportedFeature(
            "this model has no chat template; give a prompt instead of messages, or use "
            "--chat-template",
            param="messages",
        )
    text = services.template.render(line.messages or [])
    # The template writes the special tokens, so they must not be added once more.
    return NATIVE_URL, {**body, "input_ids": services.tokenizer.encode(text, False)}


def _numbered(number: int) -> str:
    return f"line-{number}"


def _count(body: Any) -> int:
    if isinstance(body, list):
        return sum(_count(part) for part in body)
    counts = body.get("usage") or body.get("meta_info") or {}
    return int(counts.get("completion_tokens") or counts.get("output_tokens") or 0)
