"""Keeps a process on one node of a machine whose memory is in parts (NUMA). Linux only."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from sapwood.base.errors import ConfigError

NODES = Path("/sys/devices/system/node")
_BIND = 2
"""MPOL_BIND of the kernel: memory comes from these nodes, or not at all."""
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
_MAX_NODES = 1024


def nodes_of(text: str) -> tuple[int, ...]:
    """The numbers in "0 1", "0,1" or a line each; ConfigError if one is no number of a node."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and int(word) < _MAX_NODES for word in words):
        raise ConfigError(f"--numa-node is {text!r} but must be numbers of nodes, such as 0 1")
    return tuple(map(int, words))


def bind_to_node(node: int, *, nodes: Path = NODES) -> frozenset[int]:
    """Run all threads of this process on the node's cores and take memory from it alone.

    Returns the cores. Raises ConfigError if the machine has no such node, or its cores are not
    among those that this process may use.
    """
    usable = cores_of_node(node, nodes) & frozenset(os.sched_getaffinity(0))
    if not usable:
        raise ConfigError(f"--numa-node is {node}, none of whose cores this process may use")
    for thread in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(thread.name), usable)
        except ProcessLookupError:  # it has ended meanwhile
            continue
    _take_memory_from(node)
    return usable


def cores_of_node(node: int, nodes: Path = NODES) -> frozenset[int]:
    """The node's cores; ConfigError if the machine has no such node."""
    listed = nodes / f"node{node}" / "cpulist"
    if not listed.exists():
        known = sorted(int(path.name[4:]) for path in nodes.glob("node[0-9]*"))
        has = f"it has {', '.join(map(str, known))}" if known else "it tells of none"
        raise ConfigError(f"--numa-node is {node}, a node that this machine does not have: {has}")
    cores: set[int] = set()
    for part in listed.read_text(encoding="ascii").strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)


def _take_memory_from(node: int) -> None:
    """For this thread and those that it starts. Where the kernel refuses, the cores alone are
    bound: memory then comes from their node first anyway."""
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None:
        return
    mask = (ctypes.c_ulong * (_MAX_NODES // 64))()
    mask[node // 64] = 1 << (node % 64)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(number, _BIND, ctypes.byref(mask), ctypes.c_ulong(_MAX_NODES + 1))
