"""The modules of a gateway, as its application uses them."""

from __future__ import annotations

from sapwood.gateway.wasm.inspected import through
from sapwood.gateway.wasm.modules import Modules
from sapwood.gateway.wasm.routes import wasm_dialect
from sapwood.gateway.wasm.runtime import Runtime
from sapwood.http.endpoints import Handler


class WasmMiddleware:
    """timeout_s and max_memory_bytes limit each call of a module."""

    def __init__(self, *, timeout_s: float, max_memory_bytes: int) -> None:
        runtime = Runtime(timeout_s=timeout_s, max_memory_bytes=max_memory_bytes)
        self._modules = Modules(runtime)
        self.dialect = wasm_dialect(self._modules)

    def around(self, handler: Handler) -> Handler:
        return through(self._modules, handler)

    def close(self) -> None:
        self._modules.close()
