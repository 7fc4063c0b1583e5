"""Which implementation is chosen, and what is said when none can be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sapwood.base.errors import ConfigError
from sapwood.kernels.cpu import CpuKernels, fast_bfloat16
from sapwood.kernels.platform import read_platform
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.registry import IMPLEMENTATIONS, Need, select_kernels
from sapwood.kernels.torch_ops import TorchKernels

NEED = Need(device="cpu", dtype=torch.bfloat16, head_dim=64, page_size=16)
HERE = "tests.kernels.test_registry"


class Picky(ReferenceKernels):
    name = "picky"

    @staticmethod
    def why_not(need: Need) -> str | None:
        return None if need.head_dim == 128 else f"head size {need.head_dim} is not 128"


TABLE = {
    "absent": "tests.kernels.no_such_module:Kernels",
    "picky": f"{HERE}:Picky",
    "torch": IMPLEMENTATIONS["torch"],
}


def test_the_first_that_can_is_chosen_and_says_why() -> None:
    selection = select_kernels(NEED, table=TABLE)
    assert isinstance(selection.kernels, TorchKernels)
    assert list(selection.refusals) == ["absent", "picky"]
    assert selection.refusals["picky"] == "head size 64 is not 128"
    assert "no_such_module" in selection.refusals["absent"]
    assert selection.why.startswith("torch: the fastest that can (absent: cannot be imported")


def test_another_need_gets_another_choice() -> None:
    need = Need(device="cpu", dtype=torch.float32, head_dim=128, page_size=16)
    assert select_kernels(need, table=TABLE).kernels.name == "picky"


def test_only_one_is_asked_for() -> None:
    selection = select_kernels(NEED, only="reference")
    assert isinstance(selection.kernels, ReferenceKernels)
    assert selection.why == "reference: asked for"


def test_none_can() -> None:
    with pytest.raises(ConfigError, match=r"bfloat16 on cpu.*picky: head size 64 is not 128"):
        select_kernels(NEED, only="picky", table=TABLE)
    integers = Need(device="cpu", dtype=torch.int8, head_dim=64, page_size=16)
    with pytest.raises(ConfigError, match=r"torch: .*int8 is not float32.*reference: "):
        select_kernels(integers)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown kernels 'fast'; known: .*reference, torch"):
        select_kernels(NEED, only="fast")


def test_a_need_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="got 0 and 16"):
        Need(device="cpu", dtype=torch.float32, head_dim=0, page_size=16)


def test_the_kv_cache_is_dense_or_in_8_bits() -> None:
    for kv_dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
        refusals = select_kernels(replace(NEED, kv_dtype=kv_dtype)).refusals
        assert not any("KV cache" in reason for reason in refusals.values())
    other = replace(NEED, kv_dtype=torch.float32)
    assert str(other).endswith("KV cache in float32, page size 16")
    with pytest.raises(ConfigError, match=r"torch: the KV cache is torch.float32, neither "):
        select_kernels(other)
    with pytest.raises(ConfigError, match="needs an even head size, not 33"):
        select_kernels(replace(NEED, kv_dtype=torch.int8, head_dim=33), only="torch")


@pytest.mark.skipif(not CpuKernels.usable_isas(), reason="no native kernels")
def test_an_instruction_set_can_be_asked_for() -> None:
    need = replace(NEED, dtype=torch.float32)
    selection = select_kernels(need, only="cpu:generic")
    assert selection.kernels.isa == "generic"
    assert selection.why == "cpu:generic: asked for"
    with pytest.raises(ConfigError, match=r"cpu:sparc, but .*usable: generic"):
        select_kernels(need, only="cpu:sparc")
    with pytest.raises(ConfigError, match="torch have no variants"):
        select_kernels(need, only="torch:avx2")


@pytest.mark.skipif(not CpuKernels.usable_isas(), reason="no native kernels")
def test_fast_bfloat16_is_that_of_the_kernels_which_serve() -> None:
    platform = replace(read_platform(), cpu_flags=frozenset({"avx512_bf16"}))
    assert not fast_bfloat16(platform, "cpu:generic")
    assert fast_bfloat16(platform, "torch")
    assert not fast_bfloat16(replace(platform, cpu_flags=frozenset()), "torch")
    best = CpuKernels.usable_isas()[-1]
    assert fast_bfloat16(platform, None) == ("bf16" in best or "amx" in best)
