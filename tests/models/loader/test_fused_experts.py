"""gpt-oss's own MXFP4 files beside transformers' model of the weights that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.kernels.coded import CodedWeight
from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.store.files import ModelFiles
from tests.models.lm.harness import Session
from tests.models.lm.peer import make_peer, random_text
from tests.models.lm.test_checkpoints import load, native  # noqa: F401 - a fixture

EXPERTS = 4
FIELDS = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 32,
    "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "sliding_window": 16,
}  # fmt: skip
CONFIG = {"quant_method": "mxfp4"}


def blocks_of(num_out: int, num_in: int) -> tuple[Tensor, Tensor, Tensor]:
    """(blocks, scales, the weight [out, in] that they stand for), at random."""
    blocks = torch.randint(0, 256, (num_out, num_in // 32, 16), dtype=torch.uint8)
    scales = torch.randint(122, 125, (num_out, num_in // 32), dtype=torch.uint8)
    factors = scales.view(torch.float8_e8m0fnu).float()
    weight = CodedWeight("fp4", (num_out, num_in), blocks.flatten(1), factors, 32)
    return blocks, scales, weight.dequantized(torch.float32)


def write(directory: Path) -> tuple[ModelFiles, Any]:
    """A checkpoint, and transformers' model of the same weights."""
    torch.manual_seed(2)
    peer = make_peer("gpt_oss", "GptOssForCausalLM", **FIELDS)
    parameters = dict(peer.model.named_parameters())
    stored = {name: tensor.clone() for name, tensor in peer.weights.items()}
    for layer in range(2):
        for name, shape in (("gate_up_proj", (192, 64)), ("down_proj", (64, 96))):
            whole = f"model.layers.{layer}.mlp.experts.{name}"
            made = [blocks_of(*shape) for _ in range(EXPERTS)]
            del stored[whole]
            stored[f"{whole}_blocks"] = torch.stack([blocks for blocks, _, _ in made])
            stored[f"{whole}_scales"] = torch.stack([scales for _, scales, _ in made])
            parameters[whole].data = torch.stack([weight.T for _, _, weight in made])
    save_file({name: one.contiguous() for name, one in stored.items()}, directory / "m.safetensors")
    config = peer.hf_config | {"quantization_config": CONFIG}
    (directory / "config.json").write_text(json.dumps(config, default=str))
    paths = (directory / "m.safetensors",)
    return ModelFiles(
        name="tiny", path=directory, weights=paths, weight_format="safetensors"
    ), peer.model


@pytest.mark.parametrize("kernels", [ReferenceKernels(), TorchKernels(), "native"])
def test_logits_are_those_of_the_weights(
    tmp_path: Path, kernels: Any, request: pytest.FixtureRequest
) -> None:
    chosen: Kernels = request.getfixturevalue("native") if kernels == "native" else kernels
    files, model = write(tmp_path)
    text = random_text(40)
    with torch.inference_mode():
        found = Session(load(files, chosen)).step({"a": text})["a"]
        want = model(torch.tensor([text])).logits[0]
    assert (found - want).abs().max() < 1e-4 * want.abs().max()


def test_too_few_experts(tmp_path: Path) -> None:
    files, _ = write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_local_experts"] = EXPERTS + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightError, match=r"is \[4, .* but must have 5 experts"):
        load(files, TorchKernels())
