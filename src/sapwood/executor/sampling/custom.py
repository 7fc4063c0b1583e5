"""Logits processors that come from outside: registered by name, or sent with a request.

A registered processor is an entry point of the group `sapwood.logits_processors`: a callable that
makes one request's processor from its custom_params. If the operator allows it, a request may also
bring code, in the format of SGLang's clients; such code can do whatever this process can.

An exception of a processor ends its request, and no other.
"""

from __future__ import annotations

import io
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import dill
import msgspec
import torch
from torch import Tensor

from sapwood.base.errors import SapwoodError
from sapwood.base.registry import Registry
from sapwood.schema.logits_processors import BUILT_IN, ENTRY_POINT, code_of
from sapwood.schema.step import RowStart

log = logging.getLogger(__name__)

Process = Callable[[Tensor, Sequence[int]], Tensor | None]
"""(logits [vocab] fp32 of one request, its output token ids so far) -> the new logits.

None stands for the given logits, changed in place.
"""

MakeProcess = Callable[[Mapping[str, Any], Sequence[int]], Process]
"""(custom_params, prompt token ids) -> one request's processor; entry points name such makers."""

LOGITS_PROCESSORS: Registry[MakeProcess] = Registry(
    "custom logit processor", BUILT_IN, entry_point=ENTRY_POINT
)

_SGLANG_BASE = ("sglang.srt.sampling.custom_logit_processor", "CustomLogitProcessor")


class CustomLogitProcessor(ABC):
    """The base class of clients' code. `to_str` makes the field `custom_logit_processor`."""

    @abstractmethod
    def __call__(self, logits: Tensor, custom_param_list: list[dict[str, Any]]) -> Tensor:
        """logits [n, vocab] and the custom_params of each row -> the new logits.

        The server calls this with one row. custom_params also has "__req__", an object with
        `origin_input_ids` and `output_ids`."""

    @classmethod
    def to_str(cls) -> str:
        return msgspec.json.encode({"callable": dill.dumps(cls).hex()}).decode()


@dataclass(slots=True)
class RequestView:
    """The view of a request that its own code gets."""

    origin_input_ids: list[int]
    output_ids: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Running:
    """One row's processor; `broken` says why there is none."""

    process: Process | None
    broken: str
    name: str
    output_ids: list[int]


class CustomProcessors:
    """The custom processor of each row that has one.

    allow_code  whether requests may bring code
    failures    row -> why its request must end; the reader of an entry removes it
    """

    def __init__(self, failures: dict[int, str], *, allow_code: bool) -> None:
        self._failures = failures
        self._allow_code = allow_code
        self._running: dict[int, _Running] = {}

    @property
    def stateful_rows(self) -> AbstractSet[int]:
        return self._running.keys()

    def start(self, start: RowStart) -> None:
        self._running.pop(start.row, None)
        asked = start.options.sampling.custom_logit_processor
        if asked is None:
            return
        process, broken = None, ""
        output_ids = list(start.output_ids)
        name = "custom_logit_processor" if code_of(asked) else f"custom_logit_processor {asked!r}"
        try:
            process = self._made(start, asked, output_ids)
        except Exception as error:  # noqa: BLE001 - foreign code; its request ends with the reason
            broken = f"{name} cannot be made: {_described(error)}"
        self._running[start.row] = _Running(process, broken, name, output_ids)

    def apply(self, logits: Tensor, rows: Sequence[int], num_outputs: Sequence[int]) -> None:
        if not self._running:
            return
        for index, row in enumerate(rows):
            running = self._running.get(row)
            if running is None:
                continue
            broken = running.broken or _run(running, logits[index])
            if broken:
                running.broken = broken
                self._failures[row] = broken
                # The request will end, but a token is drawn from these logits before.
                logits[index] = 0.0

    def accept(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        if not self._running:
            return
        for row, token_id in zip(rows, token_ids, strict=True):
            running = self._running.get(row)
            if running is not None:
                running.output_ids.append(token_id)

    def _made(self, start: RowStart, asked: str, output_ids: list[int]) -> Process:
        params = start.options.sampling.custom_params
        code = code_of(asked)
        if code is None:
            return LOGITS_PROCESSORS.get(asked)(params, start.prompt_ids)
        if not self._allow_code:
            raise PermissionError("this server takes no code from requests")
        sent = _Unpickler(io.BytesIO(bytes.fromhex(code))).load()
        processor = sent() if isinstance(sent, type) else sent
        view = RequestView(list(start.prompt_ids), output_ids)
        given = [{**params, "__req__": view}]
        return lambda logits, _: processor(logits[None], given)[0]


class _Unpickler(dill.Unpickler):  # type: ignore[misc]
    """Reads the code of SGLang's clients, although SGLang is not installed here."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == _SGLANG_BASE:
            return CustomLogitProcessor
        return super().find_class(module, name)


def _run(running: _Running, logits: Tensor) -> str:
    """Process logits [vocab] in place. Returns why that failed, or ""."""
    assert running.process is not None, "a processor that was made"
    try:
        result = running.process(logits, running.output_ids)
        if result is not None and result is not logits:
            if not isinstance(result, Tensor) or result.shape != logits.shape:
                shape = list(getattr(result, "shape", ())) or type(result).__name__
                return f"{running.name} returned {shape} instead of {list(logits.shape)} logits"
            logits.copy_(result)
        largest = float(logits.max())
    except Exception as error:  # noqa: BLE001 - foreign code; its request ends with the reason
        return f"{running.name} failed: {_described(error)}"
    if not -torch.inf < largest < torch.inf:
        return f"{running.name} left no token: its largest logit is {largest}"
    return ""


def _described(error: Exception) -> str:
    log.info("a custom logit processor failed", exc_info=error)
    message = error.message if isinstance(error, SapwoodError) else str(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
