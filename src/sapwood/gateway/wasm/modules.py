"""The modules of a gateway: added, listed and removed at run time."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import msgspec
from wasmtime.component import Component, Record

from sapwood.base.errors import InvalidRequest, NotFound, SapwoodError
from sapwood.gateway.wasm.runtime import (
    ON_REQUEST,
    ON_RESPONSE,
    Action,
    Calls,
    Hook,
    ModuleFailed,
    Runtime,
    check_exports,
)

log = logging.getLogger(__name__)

MAX_MODULES = 32
MAX_FILE_BYTES = 16 << 20
MAX_COMPILED = 10
"""Compiled components that are kept, by the hash of their files, also after a module is removed."""

_HOOKS: dict[str, Hook] = {"OnRequest": ON_REQUEST, "OnResponse": ON_RESPONSE}
_NAME = re.compile(r"[\w.@-]{1,100}")


class AttachPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    Middleware: Literal["OnRequest", "OnResponse"]


class ModuleSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What POST /wasm says of a module.

    file_path      on the gateway's machine, absolute, of a component
    attach_points  when the module is called
    """

    name: str
    file_path: str
    attach_points: list[AttachPoint]
    module_type: Literal["Middleware"] = "Middleware"

    @property
    def hooks(self) -> list[Hook]:
        return [_HOOKS[point.Middleware] for point in self.attach_points]


@dataclass(slots=True, kw_only=True)
class Module:
    id: str
    spec: ModuleSpec
    component: Component
    sha256: str
    num_bytes: int
    calls: Calls
    created_s: float = field(default_factory=time.time)
    used_s: float | None = None
    num_calls: int = 0


@dataclass(slots=True)
class Executions:
    """Of all modules, since the start."""

    num_good: int = 0
    num_failed: int = 0
    total_s: float = 0.0
    max_s: float = 0.0


class Modules:
    """All modules, which are called in the order in which they were added."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._modules: dict[str, Module] = {}
        self._compiled: OrderedDict[str, Component] = OrderedDict()
        self._executions = Executions()

    def close(self) -> None:
        self._runtime.close()

    def attached_to(self, hook: Hook) -> list[Module]:
        return [module for module in self._modules.values() if hook in module.spec.hooks]

    def load(self, spec: ModuleSpec) -> Module:
        """The module in a file, which `add` adds; reads and compiles, so not for the event loop.

        Raises InvalidRequest."""
        if not _NAME.fullmatch(spec.name):
            raise InvalidRequest("name must have 1 to 100 letters, digits, or one of . _ - @")
        if not spec.hooks:
            raise InvalidRequest("attach_points must name OnRequest or OnResponse")
        content = _read(spec.file_path)
        sha256 = hashlib.sha256(content).hexdigest()
        component = self._compiled.get(sha256)
        if component is None:
            component = self._runtime.compile(content)
        check_exports(component, spec.hooks)
        return Module(
            id=str(uuid4()),
            spec=spec,
            component=component,
            sha256=sha256,
            num_bytes=len(content),
            calls=Calls(self._runtime.timeout_s),
        )

    def add(self, module: Module) -> None:
        if len(self._modules) >= MAX_MODULES:
            raise InvalidRequest(f"there are {MAX_MODULES} modules, which is the limit")
        for other in self._modules.values():
            if other.spec.name == module.spec.name:
                raise InvalidRequest(f"there is a module {other.spec.name!r} already; remove it")
            if other.sha256 == module.sha256:
                raise InvalidRequest(f"the module {other.spec.name!r} has the same file's content")
        self._modules[module.id] = module
        self._compiled[module.sha256] = module.component
        self._compiled.move_to_end(module.sha256)
        while len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)

    def remove(self, id_: str) -> None:
        if self._modules.pop(id_, None) is None:
            raise NotFound(f"there is no module {id_[:80]!r}; see GET /wasm")

    async def call(self, module: Module, hook: Hook, value: Record) -> Action:
        """Raises ModuleFailed and Overloaded; the reason of a failure is in the log alone."""
        started_s = time.perf_counter()
        module.num_calls += 1
        module.used_s = time.time()
        try:
            action = await module.calls.run(
                lambda: self._runtime.run(module.component, hook, value)
            )
        except SapwoodError as error:
            self._executions.num_failed += 1
            log.warning("the module %s failed on a call: %s", module.spec.name, error.message)
            if not isinstance(error, ModuleFailed):
                raise
            raise ModuleFailed(
                f"the module {module.spec.name!r} of the gateway failed on this call; the "
                "gateway's log says why"
            ) from error
        finally:
            took_s = time.perf_counter() - started_s
            self._executions.total_s += took_s
            self._executions.max_s = max(self._executions.max_s, took_s)
        self._executions.num_good += 1
        return action

    def described(self) -> dict[str, Any]:
        done = self._executions
        total = done.num_good + done.num_failed
        return {
            "modules": [_described(module) for module in self._modules.values()],
            "metrics": {
                "total_executions": total,
                "successful_executions": done.num_good,
                "failed_executions": done.num_failed,
                "total_execution_time_ms": round(1000 * done.total_s, 3),
                "max_execution_time_ms": round(1000 * done.max_s, 3),
                "average_execution_time_ms": round(1000 * done.total_s / total, 3) if total else 0,
            },
        }


def specs_of(told: object) -> Sequence[ModuleSpec]:
    """The modules of a POST /wasm; InvalidRequest if there are none."""
    try:
        return msgspec.convert(told, _Asked).modules
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"this names no modules: {error}") from None


class _Asked(msgspec.Struct, forbid_unknown_fields=True):
    modules: list[ModuleSpec]


def _described(module: Module) -> dict[str, Any]:
    meta = msgspec.to_builtins(module.spec) | {
        "sha256_hash": module.sha256,
        "size_bytes": module.num_bytes,
        "created_at": _moment(module.created_s),
        "last_accessed_at": None if module.used_s is None else _moment(module.used_s),
        "access_count": module.num_calls,
    }
    return {"module_uuid": module.id, "module_meta": meta}


def _moment(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat()


def _read(file_path: str) -> bytes:
    path = Path(file_path)
    if not path.is_absolute() or ".." in path.parts or "\0" in file_path:
        raise InvalidRequest("file_path must be absolute, without ..")
    try:
        path = path.resolve(strict=True)
        # A link to another kind of file must not show whether that exists.
        if path.suffix.lower() != ".wasm" or not path.is_file():
            raise InvalidRequest("file_path must name a file that ends with .wasm")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidRequest(f"the file cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise InvalidRequest(f"the file has more than {MAX_FILE_BYTES} bytes")
    return content
