"""Jet-Nemotron against its formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sapwood.base.errors import ConfigError
from sapwood.convert.walk import Walk
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.registry import Need
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.build import Build
from sapwood.models.registry import decoder_class, read_decoder
from tests.models.lm.checks import CHECKS
from tests.models.lm.harness import CPU, Session, make_decoder
from tests.models.lm.jet_nemotron import HEAD_DIM, HF, JET, WINDOW, peer, shapes
from tests.models.lm.peer import random_text
from tests.tiers import sweep

PUBLISHED = {
    "architectures": ["JetNemotronForCausalLM"],
    "efficient_attention_config": {
        "jet": {
            "conv_size": 4,
            "dconv_generator_reduction": 8,
            "dconv_implementation": "triton",
            "expand_v": 2.6666666667,
            "head_dim": 96,
            "mode": "chunk",
            "norm_eps": "1e-5",
            "num_heads": 12,
        },
        "swa": {"window_size": 1152},
    },
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "layer_types": [*["jet"] * 14, "attn", *["jet"] * 4, "attn", "swa", "swa", *["jet"] * 6],
    "max_position_embeddings": 131_072,
    "max_window_layers": 28,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "vocab_size": 151_936,
}
"""What the 2B model's config.json says."""


def kernels_called(name: str) -> Kernels:
    if name != "native":
        return {"reference": ReferenceKernels, "torch": TorchKernels}[name]()
    reason = CpuKernels.why_not(
        Need(device="cpu", dtype=torch.float32, head_dim=HEAD_DIM, page_size=8)
    )
    if reason is not None:
        pytest.skip(f"the C++ kernels cannot run here: {reason}")
    return CpuKernels()


@sweep(kernels=["reference", "torch", "native", "recorded"], check=[*CHECKS])
def test_logits_equal_the_formulas(kernels: str, check: str) -> None:
    own = kernels_called("native" if kernels == "recorded" else kernels)
    model = make_decoder(HF, peer().weights, own)
    CHECKS[check](Session(model, recorded_by=own if kernels == "recorded" else None), peer())


def test_a_recorded_step_equals_its_ops_bit_by_bit() -> None:
    kernels, dtype = kernels_called("native"), torch.bfloat16
    weights = {name: weight.to(dtype) for name, weight in peer().weights.items()}
    model = make_decoder(HF, weights, kernels, dtype=dtype)
    eager = Session(model, dtype=dtype, state_dtype=dtype)
    recorded = Session(model, dtype=dtype, state_dtype=dtype, recorded_by=kernels)
    for step in (
        {"a": random_text(40)},
        {"a": [5], "b": random_text(19, seed=1), "c": random_text(3, seed=2)},
        {"a": [6], "b": [7], "c": [8]},
    ):
        expected, got = eager.step(step), recorded.step(step)
        assert all(torch.equal(expected[name], got[name]) for name in step)


def test_a_checkpoint_has_these_tensors_and_no_others() -> None:
    model = make_decoder(HF, peer().weights, TorchKernels())
    assert {name: target.shape for name, target in model.targets().items()} == shapes()


def test_layers_in_pauses_are_the_layers() -> None:
    """A conversion computes a layer in steps, between which it looks at inputs."""
    build = Build(kernels=TorchKernels(), device=CPU, dtype=torch.float32)
    config = read_decoder(HF)
    walk = Walk(decoder_class(config.architecture)(config, build), window=40, page_size=8)
    hidden = walk.embed(peer().weights, [torch.tensor(random_text(40))])
    for index in range(walk.num_layers):
        layer = walk.layer(index, peer().weights)
        *inputs, (stepped,) = walk.steps(layer, hidden)
        assert [x.shape[1] for (x,) in inputs] == [linear.in_size for linear in layer.linears]
        hidden = walk.run(layer, hidden)
        torch.testing.assert_close(stepped, hidden[0])


def test_the_facts_of_the_published_config() -> None:
    config = read_decoder(PUBLISHED)
    assert 1.9e9 < config.num_parameters < 2.0e9
    assert (config.sliding_window, config.windowed_layers) == (1152, (20, 21))
    assert [layer for layer in range(28) if config.heads_of(layer)] == [14, 19, 20, 21]
    (states,) = config.states
    assert {name: tensor.shape for name, tensor in states.tensors.items()} == {
        "conv": (12 * 256, 3),
        "state": (12, 96, 256),
    }


def test_what_a_file_may_leave_out() -> None:
    config = read_decoder({**PUBLISHED, "layer_types": None, "tie_word_embeddings": None})
    assert config.states == ()
    assert config.sliding_window is None
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["jet"]}, "each of its 4 layers in 'layer_types'"),
        ({"layer_types": ["jet", "mamba", "jet", "attn"]}, "attn, jet or swa"),
        ({"efficient_attention_config": None}, "an object as 'swa'"),
        ({"efficient_attention_config": {"swa": {"window_size": 8}}}, "an object as 'jet'"),
        ({"efficient_attention_config": {"swa": {}, "jet": JET}}, "'window_size'"),
    ],
)
def test_a_config_that_does_not_say_what_its_layers_are_is_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_decoder({**HF, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expand_v": 1.7}, "must be an integer"),
        ({"expand_v": 1e308}, "must be an integer"),
        ({"num_heads": 0}, "impossible heads"),
        ({"conv_size": 1}, "from 2 to 1024"),
        ({"dconv_generator_reduction": 0}, "from 1 to 80"),
        ({"dconv_generator_reduction": 81}, "from 1 to 80"),
        ({"norm_eps": "small"}, "from 0 to 1 as 'norm_eps'"),
        ({"norm_eps": "nan"}, "from 0 to 1 as 'norm_eps'"),
    ],
)
def test_impossible_sizes_are_refused(fields: dict[str, Any], message: str) -> None:
    sections = {"jet": JET | fields, "swa": {"window_size": WINDOW}}
    with pytest.raises(ConfigError, match=message):
        read_decoder({**HF, "efficient_attention_config": sections})
