"""Mixtures of checkpoints that other tools quantised, from files on disk, beside transformers'
model of the weights that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor

from sapwood.app.ranks.expert_moves import Coming
from sapwood.distributed.groups import Group
from sapwood.kernels.interface import Kernels
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.build import Groups
from sapwood.layers.expert_slots import MovableExperts
from sapwood.layers.quantization.formats import format_of
from sapwood.models.loader import quantized
from sapwood.models.loader.assign import load_weights
from sapwood.store.files import ModelFiles
from tests.models.lm.harness import Session
from tests.models.lm.peer import Peer, make_peer
from tests.models.lm.test_checkpoints import ROUNDING, TEXT, error_of, load, native  # noqa: F401
from tests.quantized_checkpoints import (
    CASES,
    ROUNDS_ACTIVATIONS,
    Maker,
    make_fp8,
    quantised,
)

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": (
        "mixtral",
        "MixtralForCausalLM",
        {"intermediate_size": 128, "num_local_experts": 4},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
        | {
            "shared_expert_intermediate_size": 192,
            "mlp_only_layers": [0],
            "intermediate_size": 192,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 128},
    ),
    "glm4_moe": (
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        | {"first_k_dense_replace": 1, "n_shared_experts": 1, "intermediate_size": 192},
    ),
}
GPT_OSS = {
    "intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2,
    "sliding_window": 16,
}  # fmt: skip
ROUTERS = ("gate", "shared_expert_gate", "router")
EXACT = 2e-5


@cache
def peer_of(model: str) -> Peer:
    model_type, architecture, fields = MODELS[model]
    return make_peer(model_type, architecture, **(SIZES | fields))


def left_as_it_is(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return {"weight": weight}, weight


def write(
    directory: Path,
    peer: Peer,
    config: Mapping[str, Any],
    make: Maker,
    *,
    leaves: Callable[[str], bool] = lambda module: module.rpartition(".")[2] in ROUTERS,
) -> tuple[ModelFiles, Tensor]:
    """A checkpoint, and transformers' logits of the weights that it stands for.

    leaves  the layers that the tool leaves out, by default routers"""
    stored, exact = quantised(
        peer.weights, lambda module: left_as_it_is if leaves(module) else make
    )
    whole = peer.hf_config | {"quantization_config": config}
    return write_files(directory / "quantised", whole, stored), exact_logits(directory, peer, exact)


def write_files(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> ModelFiles:
    directory.mkdir()
    path = directory / "model.safetensors"
    own = {name: one.contiguous().clone() for name, one in tensors.items()}
    save_file(own, path, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, default=str))
    return ModelFiles(name="tiny", path=directory, weights=(path,), weight_format="safetensors")


def exact_logits(directory: Path, peer: Peer, exact: Mapping[str, Tensor]) -> Tensor:
    """transformers' logits of these weights, which it reads as it does any checkpoint."""
    from transformers import AutoModelForCausalLM

    write_files(directory / "exact", peer.hf_config, exact)
    model = AutoModelForCausalLM.from_pretrained(directory / "exact", dtype=torch.float32).eval()
    with torch.inference_mode():
        found: Tensor = model(torch.tensor([TEXT])).logits[0]
    return found


def logits(files: ModelFiles, kernels: Kernels) -> Tensor:
    return Session(load(files, kernels)).step({"a": TEXT})["a"]


def model_of(name: str) -> Peer:
    """All models, over the cases."""
    return peer_of(list(MODELS)[list(CASES).index(name) % len(MODELS)])


@pytest.mark.parametrize("name", CASES)
def test_logits_are_transformers_of_what_the_weights_stand_for(
    name: str,
    tmp_path: Path,
    native: Kernels,  # noqa: F811 - the fixture
) -> None:
    peer = model_of(name)
    files, expected = write(tmp_path, peer, CASES[name].config, CASES[name].make)
    limit = ROUNDING if name in ROUNDS_ACTIVATIONS else EXACT
    assert error_of(logits(files, native), expected) <= limit
    # The comparison can fail: the weights before they were quantised are another model.
    assert error_of(peer.logits(TEXT), expected) > 1e-3


@pytest.mark.parametrize("name", ["nf4, double", "fp8 per tensor", "int8 rows"])
def test_a_router_that_a_tool_quantised_is_dequantised(name: str, tmp_path: Path) -> None:
    files, expected = write(
        tmp_path, peer_of("mixtral"), CASES[name].config, CASES[name].make, leaves=lambda _: False
    )
    assert error_of(logits(files, TorchKernels()), expected) <= EXACT


def test_gptq_with_rules_for_some_layers(tmp_path: Path) -> None:
    """Down projections in 8 bits, routers and one expert as they were."""
    peer, few = peer_of("qwen3_moe"), CASES["gptq 4, groups of 32"]
    many = CASES["gptq 8, groups of 32, zero points"]
    rules = {"-:.*gate$": {}, r"-:.*experts\.3\.": {}, "+:.*down_proj": {"bits": 8}}

    def make(module: str) -> Maker:
        if module.endswith("gate") or ".experts.3." in module:
            return left_as_it_is
        return many.make if module.endswith("down_proj") else few.make

    stored, exact = quantised(peer.weights, make)
    config = {**peer.hf_config, "quantization_config": {**few.config, "dynamic": rules}}
    files = write_files(tmp_path / "quantised", config, stored)
    expected = exact_logits(tmp_path, peer, exact)
    assert error_of(logits(files, TorchKernels()), expected) <= EXACT


@pytest.mark.parametrize("name", ["w4a16", "awq, groups of 32", "fp8 blocks", "nf4"])
def test_experts_that_a_tool_left_out(name: str, tmp_path: Path) -> None:
    """Experts in one tensor are no layers that a tool finds; it need not list what it passed by."""
    files, expected = write(
        tmp_path,
        peer_of("qwen3_moe"),
        CASES[name].config,
        CASES[name].make,
        leaves=lambda module: "self_attn" not in module,
    )
    assert error_of(logits(files, TorchKernels()), expected) <= EXACT


def gpt_oss_checkpoint(
    directory: Path, config: Mapping[str, Any], make: Maker, *, apart: bool
) -> tuple[ModelFiles, Tensor]:
    """gpt-oss with quantised attention. `apart`: its experts are quantised too, layer by layer."""
    peer = make_peer("gpt_oss", "GptOssForCausalLM", **(SIZES | GPT_OSS))
    parameters = dict(peer.model.named_parameters())
    stored: dict[str, Tensor] = {}
    for name, weight in peer.weights.items():
        if name.endswith("_proj.weight"):
            made, exact = make(weight)
            stored |= {name.replace("weight", kind): one for kind, one in made.items()}
            parameters[name].data = exact.float()
        elif apart and ".experts." in name:
            layers = layers_of(name, weight)
            for module, one in layers.items():
                if name.endswith("bias"):
                    stored[f"{module}.bias"] = one
                    continue
                made, exact = make(one.T.contiguous())
                stored |= {f"{module}.{kind}": part for kind, part in made.items()}
                one.copy_(exact.T)
            parameters[name].data = weight
        else:
            stored[name] = weight
    whole = peer.hf_config | {"quantization_config": config}
    with torch.inference_mode():
        return write_files(directory / "quantised", whole, stored), peer.logits(TEXT)


def layers_of(name: str, fused: Tensor) -> dict[str, Tensor]:
    """Views of a fused tensor, by the linear layers of each expert."""
    experts, _, part = name.partition(".experts.")
    found: dict[str, Tensor] = {}
    for expert, own in enumerate(fused):
        if part.startswith("down"):
            found[f"{experts}.experts.{expert}.down_proj"] = own
        else:
            for first, layer in enumerate(("gate_proj", "up_proj")):
                found[f"{experts}.experts.{expert}.{layer}"] = own[..., first::2]
    return found


@pytest.mark.parametrize("apart", [False, True], ids=["experts in one tensor", "experts apart"])
@pytest.mark.parametrize("name", ["w4a16", "nf4", "fp8 blocks"])
def test_gpt_oss(name: str, apart: bool, tmp_path: Path) -> None:
    case = CASES[name]
    files, expected = gpt_oss_checkpoint(tmp_path, case.config, case.make, apart=apart)
    assert error_of(logits(files, TorchKernels()), expected) <= EXACT


@pytest.mark.parametrize("kind", ["tensor", "channel", "block"])
def test_granites_layers_of_all_experts(kind: str, tmp_path: Path) -> None:
    """A scale per expert, per output of an expert, or per block."""
    peer = make_peer(
        "granitemoe",
        "GraniteMoeForCausalLM",
        hidden_size=128,
        intermediate_size=128,
        num_attention_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    make = make_fp8(kind, "weight_scale_inv" if kind == "block" else "weight_scale")
    config: dict[str, Any] = {"quant_method": "fp8"}
    if kind == "block":
        config["weight_block_size"] = [64, 32]
    stored, exact = dict(peer.weights), dict(peer.weights)
    for name, weight in peer.weights.items():
        if weight.ndim == 3:
            made = [make(expert) for expert in stored.pop(name)]
            stored |= {
                f"{name.removesuffix('.weight')}.{part}": torch.stack(
                    [own[part] for own, _ in made]
                )
                for part in made[0][0]
            }
            exact[name] = torch.stack([whole.float() for _, whole in made])
    files = write_files(tmp_path / "quantised", {**peer.hf_config, "quantization_config": config},
                        stored)  # fmt: skip
    expected = exact_logits(tmp_path, peer, exact)
    assert error_of(logits(files, TorchKernels()), expected) <= EXACT


SPLIT = {
    "awq, groups of 32": "mixtral",
    "gptq 4, groups of 32": "qwen3_moe",
    "fp8 blocks": "mixtral",
    "w8a16": "glm4_moe",
    "nvfp4": "qwen2_moe",
    "mxfp4": "mixtral",
    "nf4": "qwen3_moe",
}


def logits_of_part(files: ModelFiles, group: Group, *, spreads: bool) -> Tensor:
    groups = Groups(tp=group, attention=group, expert=Group() if spreads else None)
    model = load(files, TorchKernels(), groups=groups)
    return Session(model, group=group).step({"a": TEXT})["a"]


def logits_after_moves(files: ModelFiles, group: Group) -> Tensor:
    """Two experts more than the model has, all of them moved to the other rank and back again."""
    layers = MovableExperts(counts=True)
    groups = Groups(tp=group, attention=group, expert=Group())
    model = load(files, TorchKernels(), groups=groups, experts=layers, num_redundant_experts=2)
    session = Session(model, group=group)
    before = session.step({"a": TEXT})["a"]
    form = format_of(json.loads((files.path / "config.json").read_text()))
    assert form is not None
    for turn in (1, 2):
        for layer in layers.layers:
            now = layer.slots.placement
            half = len(now) // 2
            layer.plan_move([*now[half:], *now[:half]] if turn == 1 else now[::-1])
        coming = Coming(model)
        load_weights(coming, quantized.iterate(files, form, coming.targets()))
        for layer in layers.layers:
            layer.settle()
        assert error_of(session.step({f"b{turn}": TEXT})[f"b{turn}"], before) <= EXACT
    return before


def run_rank(rank: int, size: int, checkpoints: Mapping[str, ModelFiles], folder: Path) -> None:
    """One process of the group: leaves its logits in <rank>.pt."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size
    )
    assert dist.group.WORLD is not None
    group = Group.of(dist.group.WORLD)
    with torch.inference_mode():
        found = {
            (name, way): logits_after_moves(files, group)
            if way == "moved"
            else logits_of_part(files, group, spreads=way == "spread")
            for name, files in checkpoints.items()
            for way in ("shared", "spread", "moved")
        }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_logits_of_one(tmp_path: Path) -> None:
    """Ranks that share each expert, ranks that have different ones, and ranks that move them."""
    checkpoints: dict[str, ModelFiles] = {}
    alone: dict[str, Tensor] = {}
    for name, model in SPLIT.items():
        folder = tmp_path / model / name.replace(" ", "")
        folder.mkdir(parents=True)
        checkpoints[name], expected = write(
            folder, peer_of(model), CASES[name].config, CASES[name].make
        )
        alone[name] = expected
    mp.spawn(run_rank, args=(2, checkpoints, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (name, way), found in first.items():
        assert torch.equal(found, second[name, way]), f"{name}, {way}: the ranks disagree"
        assert error_of(found, alone[name]) <= EXACT, (name, way)
