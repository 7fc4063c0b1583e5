"""What a conversion writes is what it measured, whatever rows and names the checkpoint has."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sapwood.base.errors import ConfigError
from sapwood.convert.calibration import sample_inputs
from sapwood.convert.conversion import Conversion, Texts, convert
from sapwood.convert.options import ConvertOptions
from sapwood.convert.plan import Plan, make_plan
from sapwood.convert.rescale import Rescaler
from sapwood.convert.walk import Walk
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.build import Build
from sapwood.models.loader.fused_experts import FusedExperts
from sapwood.models.registry import decoder_class, read_decoder
from sapwood.store.files import ModelFiles
from sapwood.store.progress import Silent
from tests.models.lm import cases, test_renamed
from tests.models.lm.harness import Session
from tests.models.lm.peer import Peer, random_text
from tests.models.lm.test_checkpoints import load

LENGTH = 40
CPU = torch.device("cpu")
WINDOWS = [torch.tensor(random_text(LENGTH, seed=seed)) for seed in range(3)]


def peer_of(case: str) -> Peer:
    known = test_renamed if case in test_renamed.CASES else cases
    return known.peer_of(case)


def model_files(directory: Path, peer: Peer) -> ModelFiles:
    directory.mkdir()
    path = directory / "model.safetensors"
    own = {name: one.contiguous().clone() for name, one in peer.weights.items()}
    save_file(own, path, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(peer.hf_config, default=str))
    return ModelFiles(name="tiny", path=directory, weights=(path,), weight_format="safetensors")


def plan_of(peer: Peer, options: ConvertOptions) -> tuple[Walk, Plan]:
    decoder = read_decoder(peer.hf_config)
    architecture = decoder_class(decoder.architecture)
    plan = make_plan(architecture, decoder, TorchKernels(), options, ignore=())
    build = Build(kernels=TorchKernels(), device=CPU, dtype=torch.float32)
    return Walk(architecture(decoder, build), window=LENGTH, page_size=8), plan


def converted(directory: Path, peer: Peer, options: ConvertOptions) -> tuple[Conversion, Plan]:
    walk, plan = plan_of(peer, options)
    (directory / "out").mkdir()
    found = convert(
        walk,
        model_files(directory / "in", peer),
        peer.hf_config,
        read_decoder(peer.hf_config),
        plan,
        options,
        Texts(calibration=WINDOWS if options.needs_calibration else [], measured=WINDOWS),
        directory / "out",
        stored_dtype=torch.float32,
        device=CPU,
        progress=Silent(),
    )
    return found, plan


def perplexity_of(directory: Path) -> float:
    paths = tuple(sorted(directory.glob("*.safetensors")))
    files = ModelFiles(name="tiny", path=directory, weights=paths, weight_format="safetensors")
    model = load(files, TorchKernels())
    total = 0.0
    for window in WINDOWS:
        logits = Session(model).step({"a": window.tolist()})["a"][:-1]
        total += torch.nn.functional.cross_entropy(logits, window[1:]).item()
    return math.exp(total / len(WINDOWS))


MIXTURES = ("mixtral", "qwen2_moe", "glm4_moe", "granitemoe", "gpt_oss", "olmoe")
REARRANGED = (
    *("phi3, short", "glm4", "glm", "cohere", "ernie4_5", "helium"),
    *("gpt_neox", "falcon", "falcon, two norms", "bloom", "mpt", "gptj", "persimmon"),
    *("BaichuanForCausalLM", "ChatGLMModel", "InternLM2ForCausalLM", "QWenLMHeadModel"),
)


@pytest.mark.parametrize("case", [*MIXTURES, *REARRANGED])
@torch.inference_mode()
def test_what_is_written_is_what_was_measured(case: str, tmp_path: Path) -> None:
    """In groups of 8 inputs, each weight rounded for itself."""
    peer = peer_of(case)
    options = ConvertOptions(
        scheme="int4", group_size=8, method="nearest", rescale=False, window=LENGTH
    )
    found, _ = converted(tmp_path, peer, options)
    before = sum(
        torch.nn.functional.cross_entropy(peer.logits(one.tolist())[:-1], one[1:]).item()
        for one in WINDOWS
    )
    assert found.perplexity_before == pytest.approx(math.exp(before / len(WINDOWS)), rel=1e-4)
    assert found.perplexity_after == pytest.approx(perplexity_of(tmp_path / "out"), rel=2e-5)
    assert found.perplexity_after != pytest.approx(found.perplexity_before, rel=1e-4)


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "phi3, short", "olmo_hybrid"])
@torch.inference_mode()
def test_layers_are_fitted_to_their_inputs(case: str, tmp_path: Path) -> None:
    peer = peer_of(case)
    options = ConvertOptions(scheme="int4", group_size=8, window=LENGTH)
    found, plan = converted(tmp_path, peer, options)
    assert found.perplexity_after == pytest.approx(perplexity_of(tmp_path / "out"), rel=1e-4)
    fitted = [one for one in found.layers if one.output_error is not None]
    assert all(one.output_error is not None for one in found.layers if "experts" not in one.name)
    assert len({one.name for one in found.layers}) == len(plan.converted)
    assert all(0 < one.output_error < one.weight_error * 1.5 for one in fitted if one.output_error)


def test_routers_are_left_as_they_are_and_named() -> None:
    _, plan = plan_of(peer_of("qwen2_moe"), ConvertOptions(scheme="int4", group_size=8))
    assert "model.layers.1.mlp.gate" in plan.ignored
    assert "model.layers.1.mlp.shared_expert_gate" in plan.ignored
    assert "model.layers.1.mlp.experts.5.up_proj" in plan.converted
    assert ("model.layers.1.mlp.experts.5.gate_proj", "model.layers.1.mlp.experts.5.up_proj") in (
        plan.fused
    )


def test_weights_whose_rows_are_no_outputs_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"c_attn does not hold the outputs of one linear layer"):
        plan_of(peer_of("gpt2"), ConvertOptions(scheme="int8", rescale=False))


@pytest.mark.parametrize(
    "case",
    [*MIXTURES, "phi3, short", "glm", "ernie4_5", "helium", "BaichuanForCausalLM", "hunyuan"],
)
@torch.inference_mode()
def test_rescaling_changes_no_function(case: str) -> None:
    """Of all architectures with experts, or with rows in another order, that allow it."""
    peer = peer_of(case)
    config = peer.hf_config
    architecture = decoder_class(read_decoder(config).architecture)
    if not architecture.can_be_rescaled:
        pytest.skip("its norms do not allow it")
    walk, plan = plan_of(peer, ConvertOptions(scheme="int8"))
    rescaler = Rescaler(read_decoder(config), plan.scheme, plan.converted)
    weights = dict(FusedExperts(plan.targets).split(peer.weights.items()))
    hidden = walk.embed(weights, WINDOWS)
    for index in range(walk.num_layers):
        prefix = walk.names.layer(index)
        layer = walk.layer(index, weights)
        own = {name: one for name, one in weights.items() if name.startswith(f"{prefix}.")}
        changed = rescaler.rescaled(prefix, own, sample_inputs(walk, layer, hidden))
        found = walk.run(walk.layer(index, changed), hidden)
        hidden = walk.run(layer, hidden)
        torch.testing.assert_close(found, hidden, atol=1e-4, rtol=1e-4)
