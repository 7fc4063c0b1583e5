"""The table of cosines and sines, against transformers' frequencies and against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sapwood.base.errors import ConfigError
from sapwood.layers.rope_config import ROPE_BY_KIND, RopeConfig, parted_by_kind
from sapwood.layers.rotary import attention_factor, cos_sin_table, frequencies

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 1024,
    "short_factor": [1.0 + index / 50 for index in range(32)],
    "long_factor": [1.5 + index / 3 for index in range(32)],
}
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, other betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, not truncated": YARN | {"truncate": False},
    "yarn, its own attention factor": YARN | {"attention_factor": 0.8},
    "yarn, with mscale": YARN | {"mscale": 1.5, "mscale_all_dim": 0.7},
    "yarn, original length missing": {"rope_type": "yarn", "factor": 4.0},
}


def fields(**rope: Any) -> dict[str, Any]:
    return {"max_position_embeddings": 4096, "rope_parameters": {"rope_theta": 5e5} | rope}


@pytest.mark.parametrize("case", SCALED)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("context_length", [512, 4096, 9000])
def test_frequencies_equal_transformers(case: str, head_dim: int, context_length: int) -> None:
    """For "dynamic", those that transformers has once a text is `context_length` long."""
    config = fields(**SCALED[case])
    peer = LlamaConfig(head_dim=head_dim, **config)
    kind = SCALED[case]["rope_type"]
    want, want_factor = ROPE_INIT_FUNCTIONS[kind](peer, torch.device("cpu"), seq_len=context_length)
    rope = RopeConfig.from_hf(config)
    got = frequencies(rope, head_dim=head_dim, context_length=context_length)
    torch.testing.assert_close(got, want, atol=0, rtol=2e-6)
    assert attention_factor(rope, context_length) == pytest.approx(want_factor)


@pytest.mark.parametrize("context_length", [1024, 1025])
@pytest.mark.parametrize("own", [{}, {"factor": 2.0}, {"attention_factor": 1.3}])
def test_longrope_equals_transformers(own: dict[str, float], context_length: int) -> None:
    config = fields(**LONGROPE, **own)
    peer = LlamaConfig(head_dim=64, **config)
    init = ROPE_INIT_FUNCTIONS["longrope"]
    want, want_factor = init(peer, torch.device("cpu"), seq_len=context_length)
    rope = RopeConfig.from_hf(config)
    got = frequencies(rope, head_dim=64, context_length=context_length)
    torch.testing.assert_close(got, want, atol=0, rtol=2e-6)
    assert attention_factor(rope, context_length) == pytest.approx(want_factor)


def test_longrope_may_have_a_factor_of_its_own_for_each_kind_of_context() -> None:
    """As Phi-3.5-MoE says them."""
    rope = RopeConfig.from_hf(fields(**LONGROPE, short_mscale=1.2, long_mscale=1.5))
    assert [attention_factor(rope, length) for length in (1024, 1025)] == [1.2, 1.5]


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_short_texts_have_rows_of_their_own(kind: str) -> None:
    """Those of a model that serves no longer ones; then come the rows of long texts."""
    said = LONGROPE if kind == "longrope" else SCALED["dynamic"]
    rope = RopeConfig.from_hf(fields(**said) | {"max_position_embeddings": 2048})
    switch = 1024 if kind == "longrope" else 2048
    sizes = {"head_dim": 64, "device": torch.device("cpu")}
    table = cos_sin_table(rope, context_length=5000, **sizes)
    assert table.shape == (switch + 5000, 64)
    short = cos_sin_table(rope, context_length=switch, **sizes)
    assert torch.equal(table[:switch], short)
    assert rope.switch_length(switch) is None
    frequency = frequencies(rope, head_dim=64, context_length=5000)
    want = attention_factor(rope, 5000) * torch.cos(3.0 * frequency)
    torch.testing.assert_close(table[switch + 3, :32], want)
    assert not torch.allclose(table[switch + 3], short[3])


def test_texts_are_rotated_alike_where_both_ways_are_equal() -> None:
    equal = LONGROPE | {"long_factor": LONGROPE["short_factor"]}
    for said in (equal, SCALED["yarn"], {"rope_type": "dynamic", "factor": 1.0}):
        assert RopeConfig.from_hf(fields(**said)).switch_length(100_000) is None


def test_longrope_needs_a_divisor_for_each_pair() -> None:
    rope = RopeConfig.from_hf(fields(**LONGROPE))
    with pytest.raises(ConfigError, match="32 factors, but a head of this model rotates 64 pairs"):
        frequencies(rope, head_dim=128, context_length=512)


def test_layers_with_full_attention_have_their_own_rope_parameters() -> None:
    kinds = {"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 5.0}}
    config = {"max_position_embeddings": 64, "rope_parameters": kinds}
    parted = parted_by_kind(config)
    assert RopeConfig.from_hf(parted).theta == 7.0
    assert parted[ROPE_BY_KIND] == kinds
    plain = {"max_position_embeddings": 64, "rope_parameters": {"rope_theta": 5.0}}
    assert parted_by_kind(plain) == plain


def test_dynamic_within_the_trained_length_is_the_plain_embedding() -> None:
    plain, dynamic = RopeConfig.from_hf(fields()), RopeConfig.from_hf(fields(**SCALED["dynamic"]))
    tables = [
        cos_sin_table(rope, head_dim=16, context_length=4096, device=torch.device("cpu"))
        for rope in (plain, dynamic)
    ]
    assert torch.equal(tables[0], tables[1])


def test_the_table_turns_each_pair_at_its_frequency() -> None:
    rope = RopeConfig.from_hf({"max_position_embeddings": 64, "rope_theta": 100.0})
    table = cos_sin_table(rope, head_dim=4, context_length=10, device=torch.device("cpu"))
    assert table.shape == (10, 4)
    angle = torch.tensor([7.0, 7.0 / 10.0])  # position 7; theta ** (-0/4) and theta ** (-2/4)
    torch.testing.assert_close(table[7], torch.cat((angle.cos(), angle.sin())))


def test_partial_rotation_has_a_narrower_table() -> None:
    rope = RopeConfig.from_hf(fields(partial_rotary_factor=0.5))
    table = cos_sin_table(rope, head_dim=64, context_length=8, device=torch.device("cpu"))
    assert table.shape == (8, 32)


@pytest.mark.parametrize("case", SCALED)
def test_the_older_form_means_the_same(case: str) -> None:
    scaling = dict(SCALED[case])
    scaling["type"] = scaling.pop("rope_type")
    older = {"max_position_embeddings": 4096, "rope_theta": 5e5, "rope_scaling": scaling}
    assert RopeConfig.from_hf(older) == RopeConfig.from_hf(fields(**SCALED[case]))


def test_no_rope_fields_at_all() -> None:
    rope = RopeConfig.from_hf({"max_position_embeddings": 2048})
    assert (rope.theta, rope.scaling, rope.max_context_length) == (10_000.0, None, 2048)


@pytest.mark.parametrize(
    ("case", "longest"),
    [("linear", 10240), ("dynamic", 12288), ("llama3", 4096), ("yarn", 4096)],
)
def test_longest_context(case: str, longest: int) -> None:
    assert RopeConfig.from_hf(fields(**SCALED[case])).max_context_length == longest


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "banana"}, "rope type 'banana'; implemented: default, linear"),
        ({"rope_type": "longrope"}, "'longrope' needs a list 'short_factor'"),
        (LONGROPE | {"long_factor": [1.0, 0]}, "long_factor is 0 but must be a number above 0"),
        ({"rope_type": "linear"}, "'linear' needs a number 'factor', got None"),
        ({"rope_type": "linear", "factor": 0.5}, "factor is 0.5 but must be >= 1"),
        ({"rope_type": "llama3", "factor": 8.0}, "needs a number 'low_freq_factor'"),
        ({"full_attention": {"rope_type": "default"}}, "different rope_parameters for each kind"),
    ],
)
def test_refusals(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RopeConfig.from_hf(fields(**rope))


def test_entries_must_pair_up() -> None:
    with pytest.raises(ConfigError, match="rotates 3 of 6 entries"):
        RopeConfig.from_hf(fields(partial_rotary_factor=0.5)).rotary_dim(6)
