"""Page copies kept by a class that the operator names, written for SGLang's interface."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sapwood.base.errors import ConfigError
from sapwood.memory.storage.interface import StorageUnavailable, StorageUser


@dataclass(frozen=True, slots=True)
class PlugInConfig:
    """What such a class is given, under SGLang's names."""

    extra_config: dict[str, Any] = field(default_factory=dict)
    model_name: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    is_mla_model: bool = False
    is_page_first_layout: bool = True


class DynamicStorage:
    """A PageStorage (interface.py) over `exists`, `get` and `set` of a plug-in, and over
    `batch_exists`, `clear` and `close` where it has them.

    `get(key, target)` fills a tensor of bytes and returns it, or returns one, or None for a miss;
    `set(key, value)` says whether the value is kept."""

    def __init__(self, plug_in: Any) -> None:
        self._plug_in = plug_in

    @classmethod
    def of(cls, extra: Mapping[str, Any], user: StorageUser) -> DynamicStorage:
        """ConfigError if there is no such class, or it cannot be made."""
        module, name = extra.get("module_path"), extra.get("class_name")
        if not module or not name:
            raise ConfigError("the storage dynamic needs module_path and class_name")
        try:
            kind = getattr(importlib.import_module(str(module)), str(name))
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"there is no storage class {module}:{name}: {error}") from error
        try:
            config = PlugInConfig(
                extra_config=dict(extra),
                model_name=user.model,
                tp_rank=user.tp_rank,
                tp_size=user.tp_size,
                pp_rank=user.pp_rank,
                pp_size=user.pp_size,
            )
            return cls(kind(config, {}))
        except Exception as error:
            raise ConfigError(f"{module}:{name} cannot be made: {error}") from error

    def batch_exists(self, keys: Sequence[str]) -> int:
        plug_in = self._plug_in
        with _Failing():
            if hasattr(plug_in, "batch_exists"):
                return max(0, min(int(plug_in.batch_exists(list(keys))), len(keys)))
            found = (at for at, key in enumerate(keys) if not plug_in.exists(key))
            return next(found, len(keys))

    def batch_get(self, keys: Sequence[str], into: Sequence[memoryview]) -> int:
        for at, (key, view) in enumerate(zip(keys, into, strict=True)):
            with _Failing():
                found = self._plug_in.get(key, _tensor(view))
                if found is None or not _copied(found, view):
                    return at
        return len(keys)

    def batch_set(self, keys: Sequence[str], values: Sequence[memoryview]) -> int:
        for at, (key, value) in enumerate(zip(keys, values, strict=True)):
            with _Failing():
                if not self._plug_in.set(key, _tensor(value)):
                    return at
        return len(keys)

    def clear(self) -> None:
        if hasattr(self._plug_in, "clear"):
            with _Failing():
                self._plug_in.clear()

    def close(self) -> None:
        if hasattr(self._plug_in, "close"):
            with _Failing():
                self._plug_in.close()


def _tensor(view: memoryview) -> Any:
    # Here, lest whoever imports this module imports torch.
    torch = importlib.import_module("torch")
    return torch.frombuffer(view, dtype=torch.uint8)


def _copied(found: Any, view: memoryview) -> bool:
    """Whether `view` has the bytes of what a plug-in returned, which may be that view itself."""
    content = found.reshape(-1).contiguous().view(importlib.import_module("torch").uint8)
    if content.numel() != len(view):
        return False
    target = _tensor(view)
    if content.data_ptr() != target.data_ptr():
        target.copy_(content)
    return True


class _Failing:
    """Whatever a plug-in raises is StorageUnavailable."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            raise StorageUnavailable(f"the plug-in failed: {error}") from error
