"""Page copies as files that NIXL's plug-ins read and write: POSIX anywhere, GDS and 3FS where the
system has them.

Source: the Python interface of NIXL 1.5 (nixl_agent). The files are those of `FileStorage`.
"""

from __future__ import annotations

import importlib
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from sapwood.base.errors import ConfigError
from sapwood.memory.storage.file import Move
from sapwood.memory.storage.interface import StorageUnavailable

PLUGINS = {"3FS": "HF3FS", "POSIX": "POSIX", "GDS_MT": "GDS_MT", "GDS": "GDS"}
"""SGLang's names of the plug-ins that move files, first those it tries first, and NIXL's names."""
TIMEOUT_S = 30.0
_POLL_S = 1e-4
_PACKAGES = ("nixl", "nixl_cu13", "nixl_cu12", "nixl_rocm")


class NixlMoves:
    """FileMoves (file.py) by an agent of NIXL for each thread that is at work."""

    most_copies = 64

    def __init__(self, plugin: str = "auto", parameters: Mapping[str, str] | None = None) -> None:
        """plugin      one of PLUGINS; auto: the first that there is
        parameters  of the plug-in, as NIXL names them

        Raises  ConfigError without the library, StorageUnavailable without the plug-in"""
        self._api = _api()
        self._parameters = dict(parameters or {})
        self._idle: list[Any] = []
        agent = self._new_agent()
        known = [name for name in PLUGINS.values() if name in agent.get_plugin_list()]
        wanted = known if plugin == "auto" else [PLUGINS[plugin]]
        for self._plugin in wanted:
            if self._begins(agent):
                break
        else:
            raise StorageUnavailable(
                f"NIXL has no plug-in {plugin} that works here; there are {', '.join(known)}"
            )
        self._idle.append(agent)

    @property
    def plugin(self) -> str:
        return self._plugin

    def read(self, moves: Sequence[Move]) -> None:
        self._move("READ", moves)

    def write(self, moves: Sequence[Move]) -> None:
        self._move("WRITE", moves)

    def _move(self, direction: str, moves: Sequence[Move]) -> None:
        if not moves:
            return
        agent = self._idle.pop() if self._idle else self._begun()
        try:
            _carry(agent, direction, moves)
        except Exception as error:
            # The agent may still be at work on it, so nobody uses it again.
            raise StorageUnavailable(
                f"NIXL's plug-in {self._plugin} cannot {direction.lower()}: {error}"
            ) from error
        self._idle.append(agent)

    def _begun(self) -> Any:
        agent = self._new_agent()
        if not self._begins(agent):
            raise StorageUnavailable(f"NIXL's plug-in {self._plugin} does not work any more")
        return agent

    def _new_agent(self) -> Any:
        config = self._api.nixl_agent_config(backends=[])
        return self._api.nixl_agent(f"sapwood-{uuid.uuid4()}", config)

    def _begins(self, agent: Any) -> bool:
        try:
            agent.create_backend(self._plugin, self._parameters)
        except Exception:  # noqa: BLE001  # of the library, without a common class
            return False
        return True


def _api() -> ModuleType:
    # Else the library writes lines to stderr for each agent.
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    for package in _PACKAGES:
        try:
            return importlib.import_module(f"{package}._api")
        except ImportError:
            continue
    raise ConfigError(
        "the storage nixl needs the package nixl; pip install nixl, or nixl-cu12 without CUDA 13"
    )


def _carry(agent: Any, direction: str, moves: Sequence[Move]) -> None:
    memory = [(np.frombuffer(view, dtype=np.uint8).ctypes.data, len(view)) for _, _, view in moves]
    ends: dict[int, int] = {}
    for file, offset, view in moves:
        ends[file] = max(ends.get(file, 0), offset + len(view))
    known = [
        agent.register_memory([(start, size, 0, "") for start, size in memory], "DRAM"),
        agent.register_memory([(0, end, file, "") for file, end in ends.items()], "FILE"),
    ]
    handle = None
    try:
        places = agent.get_xfer_descs([(*place, 0) for place in memory], "DRAM")
        files = agent.get_xfer_descs(
            [(offset, len(view), file) for file, offset, view in moves], "FILE"
        )
        handle = agent.initialize_xfer(direction, places, files, agent.name)
        until = time.monotonic() + TIMEOUT_S
        state = agent.transfer(handle)
        while state == "PROC":
            if time.monotonic() > until:
                raise TimeoutError(f"not done after {TIMEOUT_S:g} s")
            time.sleep(_POLL_S)
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise OSError(f"its state is {state}")
    finally:
        if handle is not None:
            agent.release_xfer_handle(handle)
        for one in known:
            agent.deregister_memory(one)
