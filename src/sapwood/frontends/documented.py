"""What the routes answer, for the OpenAPI document: answers, errors and an example of each body.

Answers may have further fields; those that are named here are always there.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec

from sapwood.base.errors import SapwoodError
from sapwood.frontends.common.errors import ANTHROPIC_OVERLOADED, body_for_path
from sapwood.frontends.common.openapi import Error, NestedError

SSE, NDJSON, TEXT, JSON = (
    "text/event-stream",
    "application/x-ndjson",
    "text/plain; version=0.0.4; charset=utf-8",
    "application/json",
)
_METHODS_WITH_BODY = frozenset({"post", "put"})


class AnthropicProblem(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    message: str


class AnthropicError(msgspec.Struct, frozen=True, kw_only=True):
    """An error as the routes below /v1/messages send it."""

    type: str
    error: AnthropicProblem


class OllamaError(msgspec.Struct, frozen=True, kw_only=True):
    """An error as the routes below /api send it."""

    error: str


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int | None
    tool_call_parser: str | None


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: str
    data: list[ModelCard]


class TokenUsage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: TokenUsage


class GenerateAnswer(msgspec.Struct, frozen=True, kw_only=True):
    text: str
    output_ids: list[int]
    meta_info: dict[str, Any]


class TokenizeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Lists of lists where several texts were given."""

    tokens: list[int | list[int]]
    count: int | list[int]
    max_model_len: int


class DetokenizeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    text: str | list[str]


class FunctionCallAnswer(msgspec.Struct, frozen=True, kw_only=True):
    normal_text: str
    calls: list[dict[str, Any]]


class ReasoningAnswer(msgspec.Struct, frozen=True, kw_only=True):
    reasoning_text: str
    text: str


class HealthAnswer(msgspec.Struct, frozen=True, kw_only=True):
    status: str


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    model_path: str
    tokenizer_path: str
    is_generation: bool
    weight_version: str
    has_image_understanding: bool
    has_audio_understanding: bool
    model_type: str | None
    architectures: list[str]


class ServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """All options as they were resolved, too, each under its own name."""

    version: str
    model_path: str
    served_model_name: str
    scheduler_info: dict[str, Any]
    internal_states: list[dict[str, Any]]
    notes: list[str]


class Done(msgspec.Struct, frozen=True, kw_only=True):
    success: bool
    message: str


class Aborted(msgspec.Struct, frozen=True, kw_only=True):
    """aborted: ids of the requests that were ended."""

    success: bool
    aborted: list[str]


class Logging(msgspec.Struct, frozen=True, kw_only=True):
    success: bool
    log_requests: bool
    log_requests_level: int
    log_requests_format: str


class MessageAnswer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    type: str
    role: str
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: dict[str, Any]


class TokenCount(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int


class OllamaAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """With `message` from /api/chat and `response` from /api/generate."""

    model: str
    created_at: str
    done: bool


class OllamaModel(msgspec.Struct, frozen=True, kw_only=True):
    details: dict[str, Any]
    model_info: dict[str, Any]
    capabilities: list[str]


class OllamaModels(msgspec.Struct, frozen=True, kw_only=True):
    models: list[dict[str, Any]]


class Version(msgspec.Struct, frozen=True, kw_only=True):
    version: str


class Loads(msgspec.Struct, frozen=True, kw_only=True):
    timestamp: str
    version: str
    dp_rank_count: int
    loads: list[dict[str, Any]]
    aggregate: dict[str, float]


class Load(msgspec.Struct, frozen=True, kw_only=True):
    dp_rank: int
    num_reqs: int
    num_waiting_reqs: int
    num_tokens: int


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What the live page draws."""

    model: str
    version: str
    state: str
    samples: list[dict[str, Any]]


class NumbersAnswer(msgspec.Struct, frozen=True, kw_only=True):
    embedding: list[float]
    meta_info: dict[str, Any]


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    object: str
    data: list[dict[str, Any]]
    model: str
    usage: dict[str, int]


class Classes(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    data: list[dict[str, Any]]
    usage: dict[str, int]


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    scores: list[list[float]]
    model: str
    object: str
    usage: dict[str, int]


class Ranked(msgspec.Struct, frozen=True, kw_only=True):
    """document: only if return_documents was asked for."""

    score: float
    index: int
    meta_info: dict[str, Any]


Type = Any
ANSWERS: dict[str, tuple[Type, ...]] = {
    "/v1/models": (ModelList,),
    "/v1/models/{model}": (ModelCard,),
    "/v1/chat/completions": (ChatAnswer, SSE),
    "/v1/completions": (ChatAnswer, SSE),
    "/invocations": (ChatAnswer, SSE),
    "/generate": (GenerateAnswer | list[GenerateAnswer], SSE),
    "/tokenize": (TokenizeAnswer,),
    "/v1/tokenize": (TokenizeAnswer,),
    "/detokenize": (DetokenizeAnswer,),
    "/v1/detokenize": (DetokenizeAnswer,),
    "/parse_function_call": (FunctionCallAnswer,),
    "/separate_reasoning": (ReasoningAnswer,),
    "/health": (HealthAnswer,),
    "/health_generate": (HealthAnswer,),
    "/model_info": (ModelInfo,),
    "/get_model_info": (ModelInfo,),
    "/server_info": (ServerInfo,),
    "/get_server_info": (ServerInfo,),
    "/flush_cache": (Done,),
    "/abort_request": (Aborted,),
    "/encode": (NumbersAnswer | list[NumbersAnswer],),
    "/classify": (NumbersAnswer | list[NumbersAnswer],),
    "/v1/embeddings": (EmbeddingList,),
    "/v1/classify": (Classes,),
    "/v1/score": (Scores,),
    "/v1/rerank": (list[Ranked],),
    "/v1/messages": (MessageAnswer, SSE),
    "/v1/messages/count_tokens": (TokenCount,),
    "/api/chat": (OllamaAnswer, NDJSON),
    "/api/generate": (OllamaAnswer, NDJSON),
    "/api/show": (OllamaModel,),
    "/api/tags": (OllamaModels,),
    "/api/ps": (OllamaModels,),
    "/api/version": (Version,),
    "/metrics": (TEXT,),
    "/v1/loads": (Loads, TEXT),
    "/get_load": (list[Load],),
    "/dashboard/figures": (Figures,),
    "/start_profile": (Done,),
    "/stop_profile": (Done,),
    "/freeze_gc": (Done,),
    "/slow_down": (Done,),
    "/configure_logging": (Logging,),
}
"""By path: the shape of a JSON answer, and the content types of answers that are not JSON."""

_CHAT = {"messages": [{"role": "user", "content": "Name three trees."}], "max_tokens": 32}
_NAMED_CHAT = {"model": "default", **_CHAT}
_OLLAMA_CHAT = {
    "model": "default",
    "messages": _CHAT["messages"],
    "options": {"num_predict": 32},
    "stream": False,
}
EXAMPLES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _CHAT,
    "/invocations": _CHAT,
    "/v1/completions": {"prompt": "The oak is", "max_tokens": 16},
    "/v1/responses": {"input": "Name three trees.", "max_output_tokens": 32, "store": False},
    "/v1/batches": {
        "input_file_id": "file-1",
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    },
    "/generate": {"text": "The oak is", "sampling_params": {"max_new_tokens": 16}},
    "/vertex_generate": {
        "instances": [{"text": "The oak is"}],
        "parameters": {"sampling_params": {"max_new_tokens": 16}},
    },
    "/tokenize": {"prompt": "The oak is"},
    "/v1/tokenize": {"prompt": "The oak is"},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/v1/detokenize": {"tokens": [1, 2, 3]},
    "/parse_function_call": {
        "text": '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>',
        "tools": [{"type": "function", "function": {"name": "weather"}}],
        "tool_call_parser": "qwen",
    },
    "/separate_reasoning": {
        "text": "<think>An oak is a tree.</think>Yes.",
        "reasoning_parser": "deepseek-r1",
    },
    "/abort_request": {"rid": "my-request"},
    "/encode": {"text": "The oak is a tree."},
    "/classify": {"text": "The oak is a tree."},
    "/v1/embeddings": {"input": "The oak is a tree."},
    "/v1/classify": {"input": "The oak is a tree."},
    "/v1/score": {"query": "The oak is a", "items": [" tree", " fish"], "label_token_ids": [1, 2]},
    "/v1/rerank": {"query": "What is an oak?", "documents": ["A tree.", "A fish."]},
    "/v1/messages": _NAMED_CHAT,
    "/v1/messages/count_tokens": {"model": "default", "messages": _CHAT["messages"]},
    "/api/chat": _OLLAMA_CHAT,
    "/api/generate": {
        "model": "default",
        "prompt": "The oak is",
        "options": {"num_predict": 16},
        "stream": False,
    },
    "/api/show": {"model": "default"},
    "/start_profile": {"num_steps": 10},
    "/slow_down": {"forward_sleep_time": 0.0},
    "/configure_logging": {"log_requests": True, "log_requests_level": 1},
}

_EVENT = {
    "type": "object",
    "description": "One event; data is JSON, or [DONE] at the end.",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}
_REF = "#/components/schemas/{name}"
_ERROR_SHAPES = (Error, NestedError, AnthropicError, OllamaError)


def complete(document: dict[str, Any]) -> None:
    """Add to every operation what it answers, its errors, and an example of its body.

    What a route has already said of its answer stays.
    """
    shapes = [one for answers in ANSWERS.values() for one in answers if not isinstance(one, str)]
    schemas, components = msgspec.json.schema_components(
        [*shapes, *_ERROR_SHAPES], ref_template=_REF
    )
    document["components"]["schemas"] |= components
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    # Either key, or none, where the server was started without.
    document["security"] = [{}, {"bearer": []}, {"header": []}]
    by_shape = iter(schemas)
    known = {
        path: [one if isinstance(one, str) else next(by_shape) for one in answers]
        for path, answers in ANSWERS.items()
    }
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _describe(operation, path, method, known.get(path, []))


def _describe(operation: dict[str, Any], path: str, method: str, answers: list[Any]) -> None:
    responses = operation["responses"]
    # The framework's own; a wrong request is a 400 here.
    responses.pop("422", None)
    if answers:
        content = {
            one if isinstance(one, str) else JSON: {
                "schema": {"type": "string"} if isinstance(one, str) else one
            }
            for one in answers
        }
        responses["200"] = {"description": "What was asked for.", "content": content}
    stream = responses["200"].get("content", {}).get(SSE)
    if stream is not None:
        stream["schema"] = _EVENT
    refusal = {JSON: {"schema": {"$ref": _REF.format(name=_error_shape(path).__name__)}}}
    for status in _statuses(path, method):
        description = "Overloaded" if status == ANTHROPIC_OVERLOADED else HTTPStatus(status).phrase
        responses.setdefault(str(status), {"description": description, "content": refusal})
    media = operation.get("requestBody", {}).get("content", {}).get(JSON)
    if media is not None and path in EXAMPLES:
        media.setdefault("example", EXAMPLES[path])


def _statuses(path: str, method: str) -> list[int]:
    """Errors that any route may answer with; 401 and 403 where there are keys or origins."""
    busy = ANTHROPIC_OVERLOADED if _error_shape(path) is AnthropicError else 503
    common = [400, 401, 403, 404, 500, busy]
    return [*common, 408, 413, 504] if method in _METHODS_WITH_BODY else common


def _error_shape(path: str) -> type[msgspec.Struct]:
    """The shape of the errors of that path, which `body_for_path` makes."""
    body = body_for_path(path)(SapwoodError(""))
    if "object" in body:
        return Error
    if "type" in body:
        return AnthropicError
    return NestedError if isinstance(body["error"], dict) else OllamaError
