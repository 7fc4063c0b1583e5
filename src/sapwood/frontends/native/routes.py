"""SGLang's own dialect as a table of endpoints."""

from __future__ import annotations

from fastapi import Request, Response

from sapwood.frontends.native import adapters, admin
from sapwood.frontends.native.answer_shapes import (
    Aborted,
    AdaptersChanged,
    DetokenizeAnswer,
    Done,
    FunctionCallAnswer,
    GenerateAnswer,
    HealthAnswer,
    ModelInfo,
    ReasoningAnswer,
    ServerInfo,
    TokenizeAnswer,
)
from sapwood.frontends.native.generate import generate_text
from sapwood.frontends.native.parsing import (
    ParseFunctionCallRequest,
    SeparateReasoningRequest,
    parse_function_call,
    separate_reasoning,
)
from sapwood.frontends.native.protocol import (
    AbortRequest,
    GenerateRequest,
    LoadAdapterRequest,
    LoadSentAdapterRequest,
    UnloadAdapterRequest,
)
from sapwood.frontends.native.tokens import (
    DetokenizeRequest,
    TokenizeRequest,
    detokenize,
    tokenize,
)
from sapwood.frontends.serving.services import Services
from sapwood.http.endpoints import Dialect, Endpoint, EndpointRows
from sapwood.http.errors import json_response
from sapwood.http.openapi import SSE

ROWS: EndpointRows[Services] = EndpointRows()


def native_dialect(services: Services) -> Dialect:
    return ROWS.dialect("native", services)


@ROWS.serves(
    Endpoint(
        paths=("/generate",),
        methods=("POST", "PUT"),
        access="user",
        body=GenerateRequest,
        example={"text": "The oak is", "sampling_params": {"max_new_tokens": 16}},
        answers=(GenerateAnswer | list[GenerateAnswer], SSE),
    )
)
async def generate(request: Request, services: Services) -> Response:
    return await generate_text(request, services)


@ROWS.serves(
    Endpoint(
        paths=("/tokenize", "/v1/tokenize"),
        methods=("POST",),
        access="user",
        body=TokenizeRequest,
        example={"prompt": "The oak is"},
        answers=(TokenizeAnswer,),
    )
)
async def post_tokenize(request: Request, services: Services) -> Response:
    return await tokenize(request, services)


@ROWS.serves(
    Endpoint(
        paths=("/detokenize", "/v1/detokenize"),
        methods=("POST",),
        access="user",
        body=DetokenizeRequest,
        example={"tokens": [1, 2, 3]},
        answers=(DetokenizeAnswer,),
    )
)
async def post_detokenize(request: Request, services: Services) -> Response:
    return await detokenize(request, services)


@ROWS.serves(
    Endpoint(
        paths=("/parse_function_call",),
        methods=("POST",),
        access="user",
        body=ParseFunctionCallRequest,
        example={
            "text": '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>',
            "tools": [{"type": "function", "function": {"name": "weather"}}],
            "tool_call_parser": "qwen",
        },
        answers=(FunctionCallAnswer,),
    )
)
async def post_parse_function_call(request: Request, services: Services) -> Response:
    return await parse_function_call(request, services)


@ROWS.serves(
    Endpoint(
        paths=("/separate_reasoning",),
        methods=("POST",),
        access="user",
        body=SeparateReasoningRequest,
        example={
            "text": "<think>An oak is a tree.</think>Yes.",
            "reasoning_parser": "deepseek-r1",
        },
        answers=(ReasoningAnswer,),
    )
)
async def post_separate_reasoning(request: Request, services: Services) -> Response:
    return await separate_reasoning(request, services)


# Probes bring no keys.
@ROWS.serves(Endpoint(paths=("/health",), methods=("GET",), access="open", answers=(HealthAnswer,)))
async def get_health(request: Request, services: Services) -> Response:
    return admin.health(services)


@ROWS.serves(
    Endpoint(
        paths=("/health_generate",),
        methods=("GET",),
        access="open",
        get_has_effect=True,
        answers=(HealthAnswer,),
    )
)
async def get_health_generate(request: Request, services: Services) -> Response:
    return await admin.health_generate(request, services)


@ROWS.serves(
    Endpoint(
        paths=("/model_info", "/get_model_info"),
        methods=("GET",),
        access="user",
        answers=(ModelInfo,),
    )
)
async def get_model_info(request: Request, services: Services) -> Response:
    return json_response(admin.model_info(services))


@ROWS.serves(
    Endpoint(
        paths=("/server_info", "/get_server_info"),
        methods=("GET",),
        access="user",
        answers=(ServerInfo,),
    )
)
async def get_server_info(request: Request, services: Services) -> Response:
    return json_response(await admin.server_info(services))


@ROWS.serves(
    Endpoint(paths=("/flush_cache",), methods=("GET", "POST"), access="admin", answers=(Done,))
)
async def flush_cache(request: Request, services: Services) -> Response:
    return await admin.flush_cache(services)


@ROWS.serves(
    Endpoint(
        paths=("/abort_request",),
        methods=("POST",),
        access="admin",
        body=AbortRequest,
        example={"rid": "my-request"},
        answers=(Aborted,),
    )
)
async def abort_request(request: Request, services: Services) -> Response:
    return await admin.abort_request(request, services)


@ROWS.serves(
    Endpoint(
        paths=("/load_lora_adapter", "/v1/load_lora_adapter"),
        methods=("POST",),
        access="admin",
        body=LoadAdapterRequest,
        example={"lora_name": "mine", "lora_path": "/models/my-adapter"},
        answers=(AdaptersChanged,),
    )
)
async def load_lora_adapter(request: Request, services: Services) -> Response:
    return await adapters.load(request, services)


@ROWS.serves(
    Endpoint(
        paths=("/load_lora_adapter_from_tensors",),
        methods=("POST",),
        access="admin",
        body=LoadSentAdapterRequest,
        example={
            "lora_name": "mine",
            "config_dict": {"peft_type": "LORA", "r": 8, "lora_alpha": 16},
            "serialized_tensors": "gAR9lC4=",
        },
        answers=(AdaptersChanged,),
    )
)
async def load_lora_adapter_from_tensors(request: Request, services: Services) -> Response:
    return await adapters.load_sent(request, services)


@ROWS.serves(
    Endpoint(
        paths=("/unload_lora_adapter", "/v1/unload_lora_adapter"),
        methods=("POST",),
        access="admin",
        body=UnloadAdapterRequest,
        example={"lora_name": "mine"},
        answers=(AdaptersChanged,),
    )
)
async def unload_lora_adapter(request: Request, services: Services) -> Response:
    return await adapters.unload(request, services)
