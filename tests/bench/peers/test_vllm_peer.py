"""What vLLM is told about the machine; vLLM itself is not installed here."""

from __future__ import annotations

import os

import pytest

from sapwood.bench.peers.vllm_peer import set_environment


def test_as_many_cores_as_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"VLLM_CPU_KVCACHE_SPACE": "2"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {7, 3, 5})
    set_environment(2)
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "3,5"
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "2"
