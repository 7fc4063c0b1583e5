"""/wasm: modules are added, listed and removed. Source: parity with SGLang's gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sapwood.base.errors import InvalidRequest
from sapwood.gateway.wasm.modules import Modules, specs_of
from sapwood.http.body import read_json
from sapwood.http.endpoints import Dialect, Endpoint
from sapwood.http.errors import json_response


def wasm_dialect(modules: Modules) -> Dialect:
    dialect = Dialect("wasm")

    def admin(path: str, method: str) -> Endpoint:
        return Endpoint(paths=(path,), methods=(method,), access="admin", is_documented=False)

    @dialect.serves(admin("/wasm", "POST"))
    async def add_modules(request: Request) -> Response:
        told: list[dict[str, Any]] = []
        has_failed = False
        for spec in specs_of(await read_json(request)):
            result: dict[str, str]
            try:
                module = await asyncio.to_thread(modules.load, spec)
                modules.add(module)
                result = {"Success": module.id}
            except InvalidRequest as error:
                result = {"Error": error.message}
                has_failed = True
            told.append(msgspec.to_builtins(spec) | {"add_result": result})
        return json_response({"modules": told}, 400 if has_failed else 200)

    @dialect.serves(admin("/wasm", "GET"))
    async def list_modules(request: Request) -> Response:
        return json_response(modules.described())

    @dialect.serves(admin("/wasm/{module_uuid}", "DELETE"))
    async def remove_module(request: Request) -> Response:
        id_ = request.path_params["module_uuid"]
        modules.remove(id_)
        return json_response({"id": id_, "removed": True})

    return dialect
