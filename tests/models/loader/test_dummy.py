from __future__ import annotations

import pytest
import torch

from sapwood.layers.targets import Target
from sapwood.models.loader.dummy import random_weights

SHAPES = {
    "model.embed_tokens.weight": (2000, 64),
    "model.layers.0.mlp.up_proj.weight": (20_000, 64),
    "model.layers.0.mlp.up_proj.bias": (20_000,),
    "model.norm.weight": (64,),
}


def refuse(tensor: torch.Tensor) -> None:
    raise AssertionError("random weights are handed out, not placed")


TARGETS = {name: Target(shape, refuse) for name, shape in SHAPES.items()}


def made(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return dict(random_weights(TARGETS, seed=seed, dtype=dtype))


def test_every_target_gets_a_tensor_of_its_shape_and_dtype():
    tensors = made(0, torch.bfloat16)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == SHAPES
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_the_same_seed_gives_the_same_numbers():
    first, second, other = made(1), made(1), made(2)
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(first[embedding], other[embedding])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_have_the_right_size_everywhere(dtype):
    tensors = made(0, dtype)
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        weight = tensors[name].float()
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert weight.mean().abs().item() < 1e-3


def test_norms_are_one_and_biases_zero():
    tensors = made(0)
    assert torch.equal(tensors["model.norm.weight"], torch.ones(64))
    assert not tensors["model.layers.0.mlp.up_proj.bias"].any()


def test_no_two_rows_are_alike():
    weight = made(0)["model.layers.0.mlp.up_proj.weight"]
    assert len(torch.unique(weight, dim=0)) == len(weight)
