from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM

from sapwood.base.errors import ConfigError
from sapwood.bench.ops.options import DeltaHeads, ScanHeads, Shape
from sapwood.bench.random_model.checkpoint import write_checkpoint
from sapwood.bench.random_model.gguf_families import num_experts
from sapwood.kernels.latent import LatentSizes

DENSE = Shape(hidden=32, inner=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab=64)
MIXTURE = Shape(
    hidden=32, inner=16, num_heads=4, num_kv_heads=2, head_dim=8, vocab=64, num_experts=6,
    num_chosen=2,
)  # fmt: skip

LATENT = replace(
    MIXTURE,
    latent=LatentSizes(
        num_heads=4, rank=32, rope_dim=8, nope_dim=16, value_dim=16, query_rank=24
    ),
)  # fmt: skip
DELTA = replace(MIXTURE, delta=DeltaHeads(num_key_heads=2, num_value_heads=4, head_dim=16))
SCAN = replace(DENSE, scan=ScanHeads(num_heads=8, head_dim=8, state_size=16))
NUM_LAYERS = {DELTA: 4, SCAN: 8}
"""Of models in which not all layers are of one kind; the others have 2."""


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    vocab = {"<end>": 0} | {chr(97 + index): 1 + index for index in range(20)} | {"ab": 21}
    made = Tokenizer(BPE(vocab, [("a", "b")]))
    made.add_special_tokens(["<end>"])
    made.save(str(directory / "tokenizer.json"))
    return directory


def write(shape: Shape, directory: Path, tokenizer: Path, **changes: object) -> int:
    given = {"tokenizer": tokenizer, "dtype": "bfloat16", "seed": 3, **changes}
    return write_checkpoint(shape, NUM_LAYERS.get(shape, 2), directory, **given)


@pytest.mark.parametrize("shape", [DENSE, MIXTURE, LATENT, DELTA, SCAN])
def test_transformers_reads_it(shape: Shape, tmp_path: Path, tokenizer: Path) -> None:
    num_weights = write(shape, tmp_path / "model", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert sum(weight.numel() for weight in model.parameters()) == num_weights
    dtypes = {weight.dtype for weight in model.parameters()}
    assert torch.bfloat16 in dtypes
    # transformers reads some weights of a state in float32, whatever the file has.
    assert dtypes <= {torch.bfloat16, torch.float32}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert num_experts(config) == shape.num_experts
    assert Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json")).encode("ab").ids == [21]


def test_the_seed_decides_the_weights(tmp_path: Path, tokenizer: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(DENSE, tmp_path / name, tokenizer, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_what_cannot_be_written_is_said(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        write(DENSE, tokenizer, tokenizer)
    small = Shape(hidden=32, inner=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab=20)
    with pytest.raises(ConfigError, match="22 tokens but the shape only 20"):
        write(small, tmp_path / "model", tokenizer)
