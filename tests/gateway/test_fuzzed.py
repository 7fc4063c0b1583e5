"""What a fuzzer asks of the gateway: it answers all of it, with no 5xx of its own, and never hangs.

The gateway has no OpenAPI document: `/openapi.json` is a worker's. So the document here is made of
the gateway's table of endpoints, with the names of fields that the gateway reads itself.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import compile_path

from sapwood.gateway.app import Gateway
from sapwood.history.sqlite import SqliteHistory
from sapwood.http.endpoints import METHODS_WITH_BODY
from tests.gateway.plain.plain_stub import write_tokenizer
from tests.gateway.stubs import Asked, Stub, bench

ADMIN_KEY = "for-admins"
TEXT = {"type": "string"}
ANY: dict[str, Any] = {}
TEXTS = {"anyOf": [TEXT, {"type": "array", "items": TEXT}]}
ITEM = {
    "type": "object",
    "properties": {
        "type": {"enum": ["message", "reasoning", "function_call", "x"]},
        "role": {"enum": ["user", "assistant", "system"]},
        "content": {"anyOf": [TEXT, {"type": "array", "items": ANY}]},
        "id": TEXT,
    },
}
ITEMS = {"type": "array", "items": {"anyOf": [ITEM, ANY]}}
INPUT = {"input": {"anyOf": [TEXT, ITEMS]}, "stream": {"type": "boolean"}, "store": ANY}
RESPONSE = INPUT | {"previous_response_id": TEXT, "conversation": ANY, "background": ANY}
# Nobody listens there, so that no fuzzer asks a stranger.
NOBODY = {"type": "string", "pattern": r"^http://127\.0\.0\.1:1(/[a-z]{0,3})?$"}
# What does not exist is neither read nor loaded.
NO_FILE = {"type": "string", "pattern": "^/nowhere/[a-z]{1,5}$"}
WORKER = {
    "url": NOBODY,
    "labels": {"type": "object", "additionalProperties": TEXT},
    "priority": {"type": "integer"},
    "cost": {"type": "number"},
    "worker_type": {"enum": ["regular", "prefill", "x"]},
    "bootstrap_port": ANY,
    "disable_health_check": {"type": "boolean"},
    "health_check_interval_secs": {"type": "number"},
    "model_id": TEXT,
    "tokenizer_path": NO_FILE,
    "chat_template": TEXT,
    "tool_parser": {"enum": ["auto", "qwen25", "none", "x"]},
    "reasoning_parser": {"anyOf": [{"enum": ["auto", "qwen3"]}, ANY]},
}
MODULE = {"name": TEXT, "file_path": NO_FILE, "module_type": ANY, "attach_points": ANY}
CHAT = {
    "model": {"enum": ["m", "x"]},
    "messages": ITEMS,
    "tools": ANY,
    "stream": ANY,
    "stop": TEXTS,
}
PROMPT = {"model": {"enum": ["m", "x"]}, "prompt": TEXTS, "stream": ANY, "n": ANY}
FIELDS: dict[str, dict[str, Any]] = {
    "/workers": WORKER,
    "/workers/{worker_id}": WORKER,
    "/wasm": {"modules": {"type": "array", "items": {"type": "object", "properties": MODULE}}},
    "/v1/tokenizers": {"name": TEXT, "source": NO_FILE, "chat_template_path": NO_FILE},
    "/v1/tokenize": {"model": TEXT, "prompt": TEXTS, "add_special_tokens": ANY},
    "/v1/detokenize": {"model": TEXT, "tokens": ANY, "skip_special_tokens": ANY},
    "/v1/responses": RESPONSE,
    "/v1/conversations": {"items": ITEMS, "metadata": ANY},
    "/v1/conversations/{conversation_id}": {"metadata": ANY},
    "/v1/conversations/{conversation_id}/items": {"items": ITEMS},
    "/v1/chat/completions": CHAT,
    "/v1/completions": PROMPT,
    "/generate": {"text": TEXTS, "input_ids": ANY, "sampling_params": ANY, "stream": ANY},
}
SOME_PATHS = ("/v1/completions", "/workers", "/v1/conversations", "/v1/responses")
"""Tried in each run of the tests; the long test tries all."""


class Engine(Stub):
    """Answers whatever it is sent."""

    def answer(self, asked: Asked) -> object:
        return {"id": "r", "object": "response", "status": "completed", "output": []}


def document(gateway: Gateway) -> dict[str, Any]:
    """An OpenAPI document of all that the gateway answers."""
    told: dict[str, dict[str, Any]] = {}
    for endpoint in gateway.endpoints:
        for path in endpoint.paths:
            _, name, parameters = compile_path(path)
            for method in endpoint.methods:
                operation: dict[str, Any] = {"responses": {"default": {"description": "any"}}}
                operation["parameters"] = [
                    {"name": one, "in": "path", "required": True, "schema": TEXT}
                    for one in parameters
                ]
                if method in METHODS_WITH_BODY:
                    body = {"type": "object", "properties": FIELDS.get(name, {})}
                    content = {"application/json": {"schema": body}}
                    operation["requestBody"] = {"required": True, "content": content}
                told.setdefault(name, {})[method.lower()] = operation
    return {"openapi": "3.1.0", "info": {"title": "gateway", "version": "1"}, "paths": told}


async def fuzzed(directory: Path, *words: str, paths: Sequence[str] = ()) -> int:
    """The number of requests that the fuzzer has made, all of which were answered well."""
    model = write_tokenizer(directory / "model")
    history = SqliteHistory(None, retention_days=1.0)
    async with bench(
        Engine("a"),
        Engine("b"),
        history=history,
        admin_api_key=ADMIN_KEY,
        model_path=str(model),
        enable_wasm=True,
        # Workers that nobody hears of are not asked too often.
        worker_startup_check_interval=1.0,
        limit_s=1200.0,
    ) as made:
        told = document(made.gateway)
        # A path that is gone would be left out without a word.
        assert set(FIELDS) | set(paths) <= set(told["paths"])
        if paths:
            told["paths"] = {path: told["paths"][path] for path in paths}
        (directory / "gateway.json").write_text(json.dumps(told))
        command = [str(Path(sys.executable).parent / "schemathesis"), "run", "gateway.json"]
        command += ["--url", made.url, "-H", f"Authorization: Bearer {ADMIN_KEY}"]
        command += ["--checks", "not_a_server_error", "--request-timeout", "20", "--seed", "1"]
        command += ["--continue-on-failure", "--no-color", "--suppress-health-check", "all"]
        fuzzer = await asyncio.create_subprocess_exec(
            *command,
            *words,
            cwd=directory,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said = (await fuzzer.communicate())[0].decode()
        assert fuzzer.returncode == 0, said[-12000:]
        while made.num_open():
            await asyncio.sleep(0.005)
        # It still answers, and has forgotten none of its workers.
        assert (await made.post()).status_code == 200
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        answer = await made.client.get("/workers", headers=headers)
        assert answer.json()["stats"]["ready"] == 2
    history.close()
    found = re.search(r"(\d+) generated", said)
    assert found is not None, said[-2000:]
    return int(found[1])


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.ERROR]


def test_a_fuzzer_finds_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ("--phases", "fuzzing", "--max-examples", "3")
    assert asyncio.run(fuzzed(tmp_path, *words, paths=SOME_PATHS)) >= 10
    assert errors(caplog) == []


@pytest.mark.long
def test_2000_cases_of_a_fuzzer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ("--phases", "coverage,fuzzing", "--max-examples", "30")
    assert asyncio.run(fuzzed(tmp_path, *words)) >= 2000
    assert errors(caplog) == []
