"""Sliding windows, logit soft caps and attention sinks: the reference against transformers, and the
kernels that have none of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import (
    eager_attention_forward as gpt_oss_attention,
)

from sapwood.base.errors import ConfigError
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import (
    SINKS,
    SLIDING_WINDOW,
    SOFT_CAP,
    AttentionBatch,
    AttentionTraits,
    Kernels,
)
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.registry import IMPLEMENTATIONS, Need, select_kernels
from sapwood.kernels.torch_ops import TorchKernels

NUM_NEW, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 5, 12, 4, 2, 16
SCALE = 0.3
NEED = {"device": "cpu", "dtype": torch.float32, "head_dim": 64, "page_size": 16}


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    """New queries, all keys and values, of one request."""
    torch.manual_seed(0)
    q = torch.randn(NUM_NEW, HEADS, HEAD_DIM) * 3
    k, v = (torch.randn(KV_HEADS, LENGTH, HEAD_DIM) for _ in "kv")
    return q, k, v


def attend(kernels: Kernels, qkv: tuple[Tensor, Tensor, Tensor], traits: AttentionTraits) -> Tensor:
    q, k, v = qkv
    batch = AttentionBatch(
        page_table=torch.zeros(1, 1, dtype=torch.int32),
        query_start=torch.tensor([0, NUM_NEW], dtype=torch.int32),
        context_len=torch.tensor([LENGTH], dtype=torch.int32),
        query_lens=(NUM_NEW,),
        context_lens=(LENGTH,),
        num_decodes=0,
    )
    return kernels.paged_attention(q, k[None], v[None], batch, SCALE, traits)


def mask_of(window: int) -> Tensor:
    query = torch.arange(LENGTH - NUM_NEW, LENGTH)[:, None]
    key = torch.arange(LENGTH)[None]
    seen = (key <= query) & (key > query - window)
    return torch.zeros(1, 1, NUM_NEW, LENGTH).masked_fill(~seen, -torch.inf)


@pytest.mark.parametrize("window", [1, 4, LENGTH])
def test_soft_cap_and_window_as_in_gemma2(qkv: tuple[Tensor, Tensor, Tensor], window: int) -> None:
    module = SimpleNamespace(num_key_value_groups=2, training=False, head_dim=HEAD_DIM)
    q, k, v = qkv
    want, _ = gemma2_attention(
        module, q.transpose(0, 1)[None], k[None], v[None], mask_of(window), scaling=SCALE,
        softcap=2.0,
    )  # fmt: skip
    got = attend(ReferenceKernels(), qkv, AttentionTraits(window=window, soft_cap=2.0))
    torch.testing.assert_close(got, want[0])


def test_sinks_and_window_as_in_gpt_oss(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    sinks = torch.tensor([-2.0, 0.0, 1.0, 5.0])
    module = SimpleNamespace(num_key_value_groups=2, training=False, sinks=sinks)
    q, k, v = qkv
    want, _ = gpt_oss_attention(
        module, q.transpose(0, 1)[None], k[None], v[None], mask_of(6), scaling=SCALE
    )
    got = attend(ReferenceKernels(), qkv, AttentionTraits(window=6, sinks=sinks))
    torch.testing.assert_close(got, want[0])


@pytest.mark.parametrize("kernels", [TorchKernels, CpuKernels])
def test_kernels_without_them_refuse(
    kernels: type[TorchKernels | CpuKernels], qkv: tuple[Tensor, Tensor, Tensor]
) -> None:
    need = Need(**NEED, attention=frozenset({SOFT_CAP, SINKS}))
    reason = kernels.why_not(need)
    if reason is not None and "not built" in reason:
        pytest.skip(reason)
    assert reason == "its attention has no attention sinks and no logit soft cap"
    with pytest.raises(ValueError, match=f"{kernels.name} kernels: .* no sliding window; name it"):
        attend(kernels(), qkv, AttentionTraits(window=3))


def test_registry_finds_kernels_that_have_them() -> None:
    need = Need(**NEED, attention=frozenset({SLIDING_WINDOW}))
    table = {name: IMPLEMENTATIONS[name] for name in ("torch", "reference")}
    selection = select_kernels(need, table=table)
    assert selection.kernels.name == "reference"
    assert "no sliding window" in selection.refusals["torch"]
    with pytest.raises(ConfigError, match="page size 16, sliding window"):
        select_kernels(need, only="torch")


def test_features_and_limits() -> None:
    assert AttentionTraits().features == frozenset()
    assert AttentionTraits(window=3, sinks=torch.zeros(2)).features == {SLIDING_WINDOW, SINKS}
    with pytest.raises(ValueError, match="window must be positive, got 0"):
        AttentionTraits(window=0)
    with pytest.raises(ValueError, match="soft_cap must be positive, got -1"):
        AttentionTraits(soft_cap=-1.0)
