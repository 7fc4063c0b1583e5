from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.conformance.checks import Case
from sapwood.kernels.conformance.suite import CHECKS, run_checks
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.registry import Need, select_kernels
from sapwood.kernels.sampling_settings import SamplingSettings
from sapwood.kernels.torch_ops import TorchKernels

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def case(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Case:
    return Case(
        device=torch.device(device),
        dtype=dtype,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        page_size=4,
        hidden_size=64,
        vocab_size=300,
    )


@pytest.mark.parametrize("kind", [TorchKernels, CpuKernels])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_of_a_cpu_pass(kind: type, dtype: torch.dtype) -> None:
    need = Need(device="cpu", dtype=dtype, head_dim=32, page_size=4)
    reason = kind.why_not(need)
    if reason is not None:
        pytest.skip(f"{kind.name} cannot run here: {reason}")
    results = list(run_checks(kind(), ReferenceKernels(), [case(dtype)]))
    assert [one.name for one in results] == list(CHECKS)
    assert [one for one in results if not one.passed] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_of_a_gpu_pass(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and this machine has none")
    need = Need(device="cuda", dtype=dtype, head_dim=32, page_size=4)
    kernels = select_kernels(need).kernels
    results = list(run_checks(kernels, ReferenceKernels(), [case(dtype, "cuda")]))
    assert [one for one in results if not one.passed] == []


class Broken(TorchKernels):
    """Each op is wrong in a way of its own."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return super().rms_norm(x, weight, eps) * 1.01

    def activate_and_mul(self, x: Tensor, activation: Activation) -> Tensor:
        result = super().activate_and_mul(x, activation)
        result[-1, -1] = torch.nan
        return result

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        raise RuntimeError("no such kernel image")

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        *more: Any,
    ) -> Tensor:
        return super().paged_attention(q, value_cache, key_cache, batch, *more)

    def mask_logits(self, logits: Tensor, masks: Tensor, rows: list[int]) -> None:
        super().mask_logits(logits, masks[:-1], rows[:-1])

    def argmax(self, logits: Tensor) -> Tensor:
        return logits.flip(-1).argmax(-1).neg() + logits.shape[1] - 1

    def sample(self, logits: Tensor, settings: SamplingSettings) -> Tensor:
        count = len(settings)
        every = SamplingSettings(
            temperature=settings.temperature,
            top_k=[-1] * count,
            top_p=[1.0] * count,
            min_p=[0.0] * count,
            numbers=settings.numbers,
        )
        return super().sample(logits, every)


def test_what_is_wrong_is_found() -> None:
    results = {one.name: one for one in run_checks(Broken(), ReferenceKernels(), [case()])}
    failed = {name for name, one in results.items() if not one.passed}
    assert failed == {
        "embedding",
        "rms_norm",
        "add_rms_norm",
        "activate_and_mul",
        "attention of decodes",
        "attention of prompts",
        "attention of a mixed step",
        "8-bit KV cache",
        "experts",  # by their activation
        "experts of codes",
        "argmax",
        "mask_logits",
        "sample",
    }
    assert results["embedding"].failure == "RuntimeError: no such kernel image"
    assert results["activate_and_mul"].error == float("inf")


def test_some_checks_alone() -> None:
    results = run_checks(TorchKernels(), ReferenceKernels(), [case()], ["argmax", "linear"])
    assert [one.name for one in results] == ["argmax", "linear"]
