"""/v1/tokenizers, /v1/tokenize and /v1/detokenize. Source: parity with SGLang's gateway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest
from sapwood.gateway.exchange import Proxy
from sapwood.gateway.proxy import Forwarded
from sapwood.gateway.tokenizers.registry import Entry, Loaded, Tokenizers, check_length
from sapwood.http.body import body_limits, parse_object, read_bytes, read_json
from sapwood.http.endpoints import Dialect, Endpoint, Handler
from sapwood.http.errors import json_response
from sapwood.schema.fields import FieldTable, TokenId, parse

MAX_TEXTS = 4096


class AddRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/tokenizers.

    name                by which requests name it, in `model`
    source              directory on the gateway's machine, or the tokenizer.json in it
    chat_template_path  file with a chat template that replaces the tokenizer's own
    """

    name: str
    source: str
    chat_template_path: str | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/tokenize, as far as the gateway answers it."""

    prompt: str | list[str]
    model: str = ""
    add_special_tokens: bool = True


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/detokenize.

    tokens  the token ids of a text, or of several
    """

    tokens: list[TokenId | list[TokenId]]
    model: str = ""
    skip_special_tokens: bool = True


_ADD_FIELDS = FieldTable(title="POST /v1/tokenizers", shape=AddRequest)
_TOKENIZE_FIELDS = FieldTable(title="POST /v1/tokenize", shape=TokenizeRequest)
_DETOKENIZE_FIELDS = FieldTable(title="POST /v1/detokenize", shape=DetokenizeRequest)


def tokenizers_dialect(tokenizers: Tokenizers) -> Dialect:
    """The routes that add, show and delete tokenizers."""
    dialect = Dialect("tokenizers")

    def admin(path: str, method: str) -> Endpoint:
        return Endpoint(paths=(path,), methods=(method,), access="admin", is_documented=False)

    @dialect.serves(admin("/v1/tokenizers", "POST"))
    async def add_tokenizer(request: Request) -> Response:
        asked = parse(await read_json(request), _ADD_FIELDS)
        entry = tokenizers.add(asked.name, asked.source, asked.chat_template_path)
        headers = {"location": f"/v1/tokenizers/{entry.id}/status"}
        return json_response(_state(entry), 202, headers)

    @dialect.serves(admin("/v1/tokenizers", "GET"))
    async def list_tokenizers(request: Request) -> Response:
        return json_response({"tokenizers": [_described(entry) for entry in tokenizers]})

    @dialect.serves(admin("/v1/tokenizers/{tokenizer_id}", "GET"))
    async def get_tokenizer(request: Request) -> Response:
        return json_response(_described(_found(tokenizers, request)))

    @dialect.serves(admin("/v1/tokenizers/{tokenizer_id}/status", "GET"))
    async def get_tokenizer_status(request: Request) -> Response:
        return json_response(_state(_found(tokenizers, request)))

    @dialect.serves(admin("/v1/tokenizers/{tokenizer_id}", "DELETE"))
    async def remove_tokenizer(request: Request) -> Response:
        entry = tokenizers.remove(request.path_params["tokenizer_id"])
        return json_response({"success": True, "message": f"{entry.name} is removed"})

    return dialect


def token_handlers(tokenizers: Tokenizers, proxy: Proxy) -> Mapping[str, Handler]:
    """Path -> what answers it. Requests about a model without a tokenizer go to a worker, and so do
    those with a field that only an engine knows."""

    def loaded_for(body: Mapping[str, Any]) -> Loaded | None:
        model = body.get("model", "")
        if not isinstance(model, str):
            return None
        return tokenizers.of_model(model, is_only=proxy.fleet.base_models <= {model})

    async def tokenize(request: Request) -> Response:
        raw = await read_bytes(request)
        body = parse_object(raw, max_depth=body_limits(request).max_depth)
        loaded = loaded_for(body)
        if loaded is None or not set(body) <= set(TokenizeRequest.__struct_fields__):
            return Forwarded(proxy, request, body=raw)
        asked = parse(body, _TOKENIZE_FIELDS)
        is_one = isinstance(asked.prompt, str)
        texts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        _check_number(len(texts), "prompt")
        check_length(sum(map(len, texts)), "prompt")
        tokens = [
            await tokenizers.encode(loaded, text, add_special_tokens=asked.add_special_tokens)
            for text in texts
        ]
        counts, num_characters = [len(ids) for ids in tokens], [len(text) for text in texts]
        return json_response(
            {
                "tokens": tokens[0] if is_one else tokens,
                "count": counts[0] if is_one else counts,
                "char_count": num_characters[0] if is_one else num_characters,
                "max_model_len": proxy.fleet.max_model_len,
            }
        )

    async def detokenize(request: Request) -> Response:
        raw = await read_bytes(request)
        body = parse_object(raw, max_depth=body_limits(request).max_depth)
        loaded = loaded_for(body)
        if loaded is None:
            return Forwarded(proxy, request, body=raw)
        asked = parse(body, _DETOKENIZE_FIELDS)
        flat = [one for one in asked.tokens if isinstance(one, int)]
        lists = [one for one in asked.tokens if not isinstance(one, int)]
        if flat and lists:
            raise InvalidRequest(
                "tokens mixes token ids with lists of them; send one list, or a list of lists",
                param="tokens",
            )
        is_one = not lists
        lists = lists or [flat]
        _check_number(len(lists), "tokens")
        texts = [
            await tokenizers.decode(loaded, ids, skip_special_tokens=asked.skip_special_tokens)
            for ids in lists
        ]
        return json_response({"text": texts[0] if is_one else texts})

    return {
        "/v1/tokenize": tokenize,
        "/tokenize": tokenize,
        "/v1/detokenize": detokenize,
        "/detokenize": detokenize,
    }


def _found(tokenizers: Tokenizers, request: Request) -> Entry:
    return tokenizers.find(request.path_params["tokenizer_id"])


def _state(entry: Entry) -> dict[str, Any]:
    told: dict[str, Any] = {
        "id": entry.id,
        "status": entry.status.value,
        "message": entry.message,
    }
    if entry.loaded is not None:
        told["vocab_size"] = entry.loaded.tokenizer.vocab_size
    return told


def _described(entry: Entry) -> dict[str, Any]:
    loaded = entry.loaded
    return {
        "id": entry.id,
        "name": entry.name,
        "source": entry.source,
        "status": entry.status.value,
        "vocab_size": 0 if loaded is None else loaded.tokenizer.vocab_size,
        "has_chat_template": loaded is not None and loaded.template is not None,
    }


def _check_number(count: int, param: str) -> None:
    if not 1 <= count <= MAX_TEXTS:
        raise InvalidRequest(
            f"{param} is a list of {count} but must have 1 to {MAX_TEXTS}", param=param
        )
