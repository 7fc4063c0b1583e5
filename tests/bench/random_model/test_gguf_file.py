from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sapwood.base.errors import ConfigError
from sapwood.bench.ops.options import Shape
from sapwood.bench.random_model.gguf_file import write_gguf
from tests.bench.random_model.test_checkpoint import (
    DELTA,
    DENSE,
    LATENT,
    MIXTURE,
    SCAN,
    tokenizer,
    write,
)
from tests.models.loader.test_gguf_mixtures import logits_of

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


@pytest.mark.parametrize("shape", [LATENT, DELTA, SCAN], ids=["latent", "delta", "scan"])
def test_the_file_gives_the_logits_of_the_checkpoint(
    shape: Shape, tmp_path: Path, tokenizer: Path
) -> None:
    write(shape, tmp_path / "model", tokenizer, dtype="float32")
    alone = tmp_path / "alone"
    alone.mkdir()
    write_gguf(tmp_path / "model", alone / "model.gguf")
    # The file names no rule by which a text is split.
    shutil.copy(tokenizer / "tokenizer.json", alone)
    (alone / "tokenizer_config.json").write_text("{}")
    text = [3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 9, 7, 63, 2]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.inference_mode():
        wanted = model(torch.tensor([text])).logits[0]
    got = logits_of(alone / "model.gguf", tmp_path, text)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_a_family_without_a_form_in_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="'gpt2', only of qwen3"):
        write_gguf(tmp_path, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("shape", "arch"),
    [(DENSE, "qwen3"), (MIXTURE, "qwen3moe")],
)
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
