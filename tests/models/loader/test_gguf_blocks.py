"""Quantised matrices of GGUF files, handed through as they are."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sapwood.base.errors import WeightError
from sapwood.distributed.groups import Group
from sapwood.kernels.blocks import FORMATS
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.kernels.reference import ReferenceKernels
from sapwood.layers.quantization.gguf import gguf_scheme
from sapwood.models.config import DecoderConfig
from sapwood.models.lm.llama import LlamaForCausalLM
from sapwood.models.loader.assign import load_weights
from sapwood.models.loader.weights import iterate_blocks, iterate_weights
from sapwood.store import ModelFiles, fetch_model
from tests.blocks import random_blocks
from tests.gguf_sample import GgufSample

ATTENTION = ("attn_q", "attn_k", "attn_v")


@pytest.fixture
def prepare(tmp_path):
    def prepare(sample):
        path = sample.write(tmp_path / "m.gguf")
        return fetch_model(str(path), home=tmp_path / "home")

    return prepare


ONLY_READ = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
"""Types that the gguf library does not make, but reads."""


def quantise(sample, kind_of):
    """Every matrix in the type that kind_of(name) gives it; None leaves fp32."""
    for name, weight in sample.weights().items():
        kind = kind_of(name) if weight.ndim == 2 else None
        if kind is not None:
            qtype = gguf.GGMLQuantizationType[kind]
            if kind in ONLY_READ:
                blocks = random_blocks(kind.lower(), *weight.shape).data.numpy()
            else:
                blocks = gguf.quantize(weight, qtype)
            sample.raw[name] = (blocks, qtype)
    return sample


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        *((kind.upper(), "llama") for kind in FORMATS),
        ("Q8_0", "qwen3"),
        ("Q4_K", "qwen3"),
    ],
)
def test_blocks_are_the_tensor_that_is_dequantised(prepare, kind, architecture):
    """Llama's rotary rows are put back in order in both."""
    sample = GgufSample(architecture=architecture)
    if architecture == "qwen3":
        for layer in range(2):
            for name in ("attn_q_norm", "attn_k_norm"):
                sample.tensors[f"blk.{layer}.{name}.weight"] = np.ones(64, dtype=np.float32)
    files = prepare(quantise(sample, lambda name: kind))
    dense = dict(iterate_weights(files, dtype=torch.float32))
    found = dict(iterate_blocks(files, dtype=torch.float32))
    assert list(found) == list(dense)
    for name, tensor in found.items():
        assert isinstance(tensor, QuantizedWeight) == (dense[name].ndim == 2), name
        if isinstance(tensor, QuantizedWeight):
            assert tensor.kind == kind.lower()
            tensor = tensor.dequantized(torch.float32)
        assert torch.equal(tensor, dense[name]), name


def test_matrices_of_plain_numbers_come_in_the_dtype(prepare):
    kinds = {"ffn_up": "BF16", "ffn_down": "F16"}

    def kind_of(name):
        return kinds.get(name.split(".")[2], "Q8_0") if name.startswith("blk.") else None

    files = prepare(quantise(GgufSample(), kind_of))
    found = dict(iterate_blocks(files, dtype=torch.bfloat16))
    for part in ("up", "down"):
        weight = found[f"model.layers.1.mlp.{part}_proj.weight"]
        assert isinstance(weight, torch.Tensor)
        assert weight.dtype == torch.bfloat16
    assert isinstance(found["model.layers.1.mlp.gate_proj.weight"], QuantizedWeight)


def test_blocks_outlive_the_file(prepare):
    files = prepare(quantise(GgufSample(), lambda name: "Q8_0"))
    found = dict(iterate_blocks(files, dtype=torch.float32))
    weight = found["model.layers.0.mlp.up_proj.weight"]
    before = weight.data.clone()
    with files.weights[0].open("r+b") as file:
        size = files.weights[0].stat().st_size
        file.write(b"\0" * size)
    assert torch.equal(weight.data, before)


def test_a_model_is_filled_with_the_blocks_of_its_file(prepare):
    """Types that differ inside a fused layer, one of them plain numbers; a tied output layer."""
    kinds = {"attn_q": "Q4_K", "attn_k": "Q8_0", "attn_v": "Q6_K", "ffn_gate": "F16"}

    def kind_of(name):
        return kinds.get(name.split(".")[2], "Q4_1") if name.startswith("blk.") else "Q8_0"

    files = prepare(quantise(GgufSample(), kind_of))
    hf_config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 262,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
        "tie_word_embeddings": True,
    }
    config = DecoderConfig.from_hf(hf_config)
    model = LlamaForCausalLM(
        config,
        ReferenceKernels(),
        Group(),
        torch.device("cpu"),
        torch.float32,
        gguf_scheme(),
    )
    report = load_weights(model, iterate_blocks(files, dtype=torch.float32))
    parts = model.parts()  # all is packed already
    assert [part.kind for part in parts.layers[0].qkv.parts] == ["q4_k", "q8_0", "q6_k"]
    assert parts.lm_head.parts[0].kind == "q8_0"
    assert not hasattr(parts.layers[0].gate_up, "parts")  # F16 makes the fused layer dense
    dense = dict(iterate_weights(files, dtype=torch.float32))
    down = parts.layers[1].down.parts[0]
    wanted = dense["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(down.dequantized(torch.float32), wanted)
    assert report.num_bytes < sum(tensor.numel() * 2 for tensor in dense.values())


def test_formats_without_blocks_are_refused_with_what_to_use(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    files = ModelFiles(
        name="tiny",
        path=tmp_path,
        weights=(tmp_path / "model.safetensors",),
        weight_format="safetensors",
    )
    with pytest.raises(WeightError, match=r"tiny has safetensors weights.*w4a8 or w8a8_int8"):
        iterate_blocks(files, dtype=torch.float32)
