"""Decoders of checkpoints that other tools quantised, from files on disk: beside transformers'
model of the weights that they stand for, and beside transformers' own loaders of such files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from sapwood.base.errors import WeightError
from sapwood.distributed.pipe import Pipe
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.registry import Need
from sapwood.layers.build import Build, Groups
from sapwood.layers.quantization.formats import format_of
from sapwood.layers.quantization.gguf import CheckpointScheme
from sapwood.models.lm.decoder import Decoder
from sapwood.models.loader import quantized
from sapwood.models.loader.assign import load_weights
from sapwood.models.registry import read_decoder
from sapwood.schema.stage import Stage
from sapwood.store.files import ModelFiles
from tests.models.lm.harness import CPU, Session
from tests.models.lm.peer import Peer, make_peer, random_text
from tests.quantized_checkpoints import (
    CASES,
    FP8,
    ROUNDS_ACTIVATIONS,
    Maker,
    compressed,
    int_args,
    quantised,
)

FIELDS = {
    "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32,
}  # fmt: skip
ROUNDING = 0.04
"""What int8 activations may change of logits: the standard deviation of the error, in units of the
logits' own."""
TEXT = random_text(24)


@cache
def peer_of(model: str, tied: bool) -> Peer:
    architecture = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[model]
    return make_peer(model, architecture, **FIELDS, tie_word_embeddings=tied)


def write(
    directory: Path, peer: Peer, config: Mapping[str, Any], make: Any
) -> tuple[ModelFiles, dict[str, Tensor]]:
    """A checkpoint in one file, its config.json; and the weights that it stands for."""
    weights = dict(peer.weights)
    if peer.hf_config["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    stored, exact = quantised(weights, make)
    stored = {name: one.contiguous().clone() for name, one in stored.items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    whole = peer.hf_config | {"quantization_config": config}
    (directory / "config.json").write_text(json.dumps(whole, default=str))
    paths = (directory / "model.safetensors",)
    files = ModelFiles(name="tiny", path=directory, weights=paths, weight_format="safetensors")
    return files, exact


def load(
    files: ModelFiles,
    kernels: Kernels,
    dtype: torch.dtype = torch.float32,
    groups: Groups | None = None,
    stage: Stage | None = None,
    pipe: Pipe | None = None,
    **build_options: Any,
) -> Any:
    hf_config = json.loads((files.path / "config.json").read_text())
    form = format_of(hf_config)
    assert form is not None
    scheme = CheckpointScheme(form.name)
    build = Build(
        kernels=kernels,
        device=CPU,
        dtype=dtype,
        scheme=scheme,
        groups=groups or Groups(),
        **build_options,
    )
    model = Decoder.of(read_decoder(hf_config), build, stage, pipe)

    def is_here(name: str) -> bool:
        return not model.is_elsewhere(name)

    load_weights(model, quantized.iterate(files, form, model.targets(), wanted=is_here))
    model.finalize()
    return model


def logits(files: ModelFiles, kernels: Kernels, **how: Any) -> Tensor:
    return Session(load(files, kernels, **how), dtype=how.get("dtype", torch.float32)).step(
        {"a": TEXT}
    )["a"]


def exact_logits(peer: Peer, exact: Mapping[str, Tensor]) -> Tensor:
    config = AutoConfig.for_model(**peer.hf_config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(dict(exact), strict=False)
    model.tie_weights()
    found: Tensor = model(torch.tensor([TEXT])).logits[0]
    return found


def error_of(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).std() / expected.std()).item()


@pytest.fixture
def native() -> CpuKernels:
    need = Need(device="cpu", dtype=torch.float32, head_dim=32, page_size=8)
    reason = CpuKernels.why_not(need)
    if reason is not None:
        pytest.skip(f"the C++ kernels cannot run here: {reason}")
    return CpuKernels(num_threads=1)


def model_of(name: str) -> Peer:
    """Both architectures, tied and not, over the cases."""
    index = list(CASES).index(name)
    return peer_of(("llama", "qwen3")[index % 2], tied=index // 2 % 2 == 1)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_transformers_of_what_the_weights_stand_for(
    name: str, tmp_path: Path, native: CpuKernels
) -> None:
    """Scales of q, k and v differ, also where each is of a whole tensor. In fp32 the products are
    exact but for the order of sums; with bfloat16 activations as in any bfloat16 model."""
    peer = model_of(name)
    files, exact = write(tmp_path, peer, CASES[name].config, lambda _: CASES[name].make)
    expected = exact_logits(peer, exact)
    limit = ROUNDING if name in ROUNDS_ACTIVATIONS else 1e-5
    assert error_of(logits(files, native), expected) <= limit
    assert error_of(logits(files, native, dtype=torch.bfloat16), expected) <= ROUNDING
    # The comparison can fail: the weights before they were quantised are another model.
    assert error_of(peer.logits(TEXT), expected) > 1e-3


def mixture(module: str) -> Maker:
    if "q_proj" in module or "gate" in module:
        return CASES["fp8 per tensor, compressed"].make
    return CASES["w4a16"].make if "down" in module else CASES["w8a16"].make


def mixed_config() -> dict[str, Any]:
    parts = {
        "re:.*(q_proj|gate_proj)$": compressed("float-quantized", FP8 | {"strategy": "tensor"}),
        "re:.*down_proj": compressed("pack-quantized", int_args(4, "group", 32)),
        "Linear": compressed("pack-quantized", int_args(8, "channel")),
    }
    groups = {}
    for index, (target, case) in enumerate(parts.items()):
        group = case.config["config_groups"]["group_0"]
        groups[f"group_{index}"] = group | {"targets": [target], "format": case.config["format"]}
    first = next(iter(parts.values())).config
    return dict(first) | {"format": "mixed-precision", "config_groups": groups}


def test_parts_of_one_layer_in_different_schemes(tmp_path: Path, native: CpuKernels) -> None:
    peer = peer_of("llama", False)
    files, exact = write(tmp_path, peer, mixed_config(), mixture)
    expected = exact_logits(peer, exact)
    for kernels in (native, ReferenceKernels()):
        assert error_of(logits(files, kernels), expected) <= 1e-5


def test_a_part_that_is_not_quantised_makes_its_layer_dense(
    tmp_path: Path, native: CpuKernels
) -> None:
    peer = peer_of("llama", False)
    case = CASES["w4a16"]
    config = dict(case.config) | {"ignore": ["lm_head", "re:.*k_proj", "re:.*layers.1.mlp"]}

    def make(module: str) -> Maker:
        is_left = "k_proj" in module or "layers.1.mlp" in module
        return (lambda weight: ({"weight": weight}, weight)) if is_left else case.make

    files, exact = write(tmp_path, peer, config, make)
    assert error_of(logits(files, native), exact_logits(peer, exact)) <= 1e-5


def test_a_recorded_step_equals_its_ops_bit_by_bit(tmp_path: Path, native: CpuKernels) -> None:
    files, _ = write(tmp_path, peer_of("llama", False), mixed_config(), mixture)
    model = load(files, native, torch.bfloat16)
    runs = [
        Session(model, dtype=torch.bfloat16, recorded_by=recorder) for recorder in (None, native)
    ]
    steps: list[dict[str, list[int]]] = [{"a": TEXT[:20]}, {"a": TEXT[20:21], "b": TEXT[:9]}]
    for step in steps:
        eager, recorded = (run.step(step) for run in runs)
        assert all(torch.equal(eager[name], recorded[name]) for name in step)


def test_what_a_file_lacks_is_named(tmp_path: Path) -> None:
    case = CASES["gptq 4, groups of 32"]

    def make(module: str) -> Maker:
        def without_zeros(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            tensors, exact = case.make(weight)
            del tensors["qzeros"]
            return tensors, exact

        return without_zeros if module.endswith("1.mlp.up_proj") else case.make

    files, _ = write(tmp_path, peer_of("llama", False), case.config, make)
    with pytest.raises(WeightError, match=r"lacks model.layers.1.mlp.up_proj.qzeros, which gptq"):
        load(files, ReferenceKernels())


def test_a_layer_that_should_be_quantised_and_is_not_is_dense(
    tmp_path: Path, native: CpuKernels
) -> None:
    peer = peer_of("llama", False)
    files, _ = write(tmp_path, peer, CASES["w4a16"].config, lambda _: lambda w: ({"weight": w}, w))
    assert error_of(logits(files, native), peer.logits(TEXT)) <= 1e-5


@pytest.mark.parametrize(
    ("case", "limit"),
    [
        ("w4a16", 1e-5),
        ("w8a16", 1e-5),
        ("fp8, compressed", 1e-5),
        ("nf4, double", 0.02),  # bitsandbytes' CPU kernel computes in bfloat16
        ("nvfp4", 0.03),  # compressed-tensors dequantises to bfloat16, and so runs in it
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_transformers_own_loader_gives_the_same_logits(
    case: str, limit: float, tmp_path: Path, native: CpuKernels
) -> None:
    config = dict(CASES[case].config) | {"quantization_status": "compressed"}
    files, _ = write(tmp_path, peer_of("llama", False), config, lambda _: CASES[case].make)
    dtype = torch.bfloat16 if case == "nvfp4" else torch.float32
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    expected = peer(torch.tensor([TEXT])).logits[0].float()
    assert error_of(logits(files, native), expected) <= limit
