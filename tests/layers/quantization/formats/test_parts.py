"""Parts of the tensors of a layer: they make the same part of its weight, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.kernels.coded import LinearPart
from sapwood.layers.quantization.formats import format_of
from sapwood.layers.quantization.formats.interface import CheckpointFormat, LinearTensors
from sapwood.layers.quantization.formats.parts import parts_of
from sapwood.layers.targets import Slice
from tests.quantized_checkpoints import CASES

SHAPE = (128, 192)
MODULE = "model.layers.0.self_attn.q_proj"
UNCUT = ("nf4", "nf4, double", "mxfp4 blocks")
ACT_ORDER = ("gptq 4, act-order, zero points", "w4a16, act-order")


def form_of(name: str) -> CheckpointFormat:
    form = format_of({"quantization_config": CASES[name].config})
    assert form is not None
    return form


def made(name: str) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return CASES[name].make(torch.randn(SHAPE) * 0.1)[0]


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {kind: tuple(one.shape) for kind, one in tensors.items()}


def dense(weight: Tensor | LinearPart) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dequantized(torch.float32)


def of_part(name: str, tensors: dict[str, Tensor], own: Slice) -> Tensor | LinearPart:
    form = form_of(name)
    parts = parts_of(shapes_of(tensors), SHAPE, own, form.units(MODULE))
    assert parts is not None
    cut = {kind: one if (p := parts[kind]) is None else p.of(one) for kind, one in tensors.items()}
    found = LinearTensors(MODULE, SHAPE, cut, form.name, own)
    weight = form.linear(found)
    found.refuse_others()
    return weight


@pytest.mark.parametrize("name", [name for name in CASES if name not in UNCUT])
def test_a_part_is_the_same_part_of_the_whole(name: str) -> None:
    tensors = made(name)
    form = form_of(name)
    whole = dense(form.linear(LinearTensors(MODULE, SHAPE, tensors, form.name)))
    for own in (Slice(dim=0, first=64, size=64), Slice(dim=1, first=64, size=64)):
        weight = of_part(name, tensors, own)
        assert torch.equal(dense(weight), own.of(whole))
        is_dense = name in ACT_ORDER and own.dim == 1
        assert isinstance(weight, Tensor) == is_dense
        if not isinstance(weight, Tensor):
            assert weight.num_bytes <= 1.3 * weight.shape[0] * weight.shape[1]


@pytest.mark.parametrize(
    ("name", "own"),
    [
        *[(name, Slice(dim=0, first=0, size=64)) for name in UNCUT],
        ("awq, groups of 64", Slice(dim=1, first=0, size=96)),
        ("awq, groups of 64", Slice(dim=0, first=4, size=8)),
        ("gptq 4, groups of 32", Slice(dim=0, first=0, size=4)),
        ("fp8 blocks", Slice(dim=0, first=32, size=64)),
        ("w4a16, zero points", Slice(dim=0, first=0, size=4)),
        ("nvfp4", Slice(dim=1, first=0, size=8)),
    ],
)
def test_what_would_cut_a_word_or_a_group_is_read_whole(name: str, own: Slice) -> None:
    assert parts_of(shapes_of(made(name)), SHAPE, own, form_of(name).units(MODULE)) is None


def test_tensors_that_are_unknown_or_of_another_size_are_read_whole() -> None:
    own = Slice(dim=0, first=0, size=64)
    plain = {"weight": (128, 192)}
    assert parts_of(plain, SHAPE, own, None) == {"weight": own}
    assert parts_of(plain | {"smooth": (128,)}, SHAPE, own, (1, 1)) is None
    assert parts_of(plain | {"weight_scale": (96, 1)}, SHAPE, own, (64, 1)) is None


def test_parts_of_files_without_act_order_stay_quantised() -> None:
    """Files say the group of each input even where inputs are in order."""
    name = "gptq 4, groups of 32"
    tensors, own = made(name), Slice(dim=1, first=96, size=96)
    assert "g_idx" in tensors
    weight = of_part(name, tensors, own)
    assert not isinstance(weight, Tensor)
    assert weight.num_bytes < 0.8 * weight.shape[0] * weight.shape[1]


def test_an_index_beyond_the_groups_is_refused() -> None:
    name = "gptq 4, act-order, zero points"
    tensors = made(name)
    tensors["g_idx"] = tensors["g_idx"] + 1
    with pytest.raises(WeightError, match=rf"{MODULE}.g_idx names groups 1 to 3 but there are 3"):
        of_part(name, tensors, Slice(dim=1, first=0, size=96))
