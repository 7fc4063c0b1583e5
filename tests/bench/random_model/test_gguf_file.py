from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sapwood.bench.random_model.gguf_file import write_gguf
from tests.bench.random_model.test_checkpoint import DENSE, MIXTURE, tokenizer, write

__all__ = ["tokenizer"]


def numbers(tensor: gguf.ReaderTensor) -> torch.Tensor:
    shape = tuple(reversed(tensor.shape.tolist()))
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        return torch.from_numpy(np.array(tensor.data)).view(torch.bfloat16).view(shape)
    return torch.from_numpy(np.array(tensor.data)).view(shape)


def test_the_weights_of_a_mixture(tmp_path: Path, tokenizer: Path) -> None:
    write(MIXTURE, tmp_path / "model", tokenizer)
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    found = {one.name: one for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    weights = load_file(tmp_path / "model" / "model.safetensors")
    experts = [weights[f"model.layers.1.mlp.experts.{e}.up_proj.weight"] for e in range(6)]
    assert torch.equal(numbers(found["blk.1.ffn_up_exps.weight"]), torch.stack(experts))
    queries = numbers(found["blk.0.attn_q.weight"])
    assert torch.equal(queries, weights["model.layers.0.self_attn.q_proj.weight"])
    for name in ("blk.0.ffn_gate_inp.weight", "output_norm.weight", "blk.1.attn_k_norm.weight"):
        assert found[name].tensor_type == gguf.GGMLQuantizationType.F32
    assert len(found) == len(weights) - 2 * 3 * (MIXTURE.num_experts - 1)


@pytest.mark.parametrize(("shape", "arch"), [(DENSE, "qwen3"), (MIXTURE, "qwen3moe")])
def test_the_metadata(shape: object, arch: str, tmp_path: Path, tokenizer: Path) -> None:
    write(shape, tmp_path / "model", tokenizer)
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    found = {name: field.contents() for name, field in fields.items()}
    assert found["general.architecture"] == arch
    assert found[f"{arch}.embedding_length"] == 32
    assert found[f"{arch}.attention.key_length"] == 8
    assert found.get(f"{arch}.expert_used_count", 0) == shape.num_chosen
    tokens = found["tokenizer.ggml.tokens"]
    assert (len(tokens), tokens[0], tokens[21]) == (64, "<end>", "ab")
    assert found["tokenizer.ggml.token_type"][:2] == [3, 1]
    assert found["tokenizer.ggml.token_type"][22] == 5
    assert found["tokenizer.ggml.merges"] == ["a b"]
