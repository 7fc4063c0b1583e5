"""The table of cosines and sines of a rotary position embedding.

Frequencies and angles are computed in fp32, as they were in training.

"dynamic" (NTK-aware) scaling stretches the base with the length of the text once that exceeds the
trained maximum, and "longrope" has two lists of divisors, for short and for long texts. A text that
is no longer than that (RopeConfig.switch_length) is rotated as in training. If each longer text
stretched the base anew while it grows, early keys in the cache would be rotated with one base and
later keys with another, and long texts could share no prefix: here all longer texts get the base
that is right for the context length that is served. The table has the rows of short texts first,
then those of long ones; the engine knows which of these rows a text begins with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.layers.rope_config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    ProportionalScaling,
    RopeConfig,
    YarnScaling,
)


def cos_sin_table(
    rope: RopeConfig, *, head_dim: int, context_length: int, device: torch.device
) -> Tensor:
    """[rows, rotary_dim] fp32: cosines in the first half, sines in the second.

    There is a row for each position. If texts beyond some length are rotated otherwise, rows for
    the positions of texts up to that length come before those."""
    lengths = [context_length]
    switch = rope.switch_length(context_length)
    if switch is not None:
        lengths.insert(0, switch)
    tables = []
    for length in lengths:
        frequency = frequencies(rope, head_dim=head_dim, context_length=length)
        position = torch.arange(length, dtype=torch.float32)
        angle = position[:, None] * frequency
        table = torch.cat((angle.cos(), angle.sin()), dim=-1)
        tables.append(table.mul_(attention_factor(rope, length)))
    return torch.cat(tables).to(device)


def unrotated(context_length: int, device: torch.device) -> Tensor:
    """[context_length, 2]: the table of a layer that rotates nothing."""
    return torch.tensor([1.0, 0.0], device=device).repeat(context_length, 1)


def rotated(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """x [T, heads, head_dim], each head rotated by its token's row of the table cos_sin; positions
    [T]"""
    width = cos_sin.shape[1]
    cos, sin = cos_sin[positions][:, None].chunk(2, dim=-1)
    first, second = x[..., :width].float().chunk(2, dim=-1)
    parts = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*(part.to(x.dtype) for part in parts), x[..., width:]), dim=-1)


def frequencies(rope: RopeConfig, *, head_dim: int, context_length: int) -> Tensor:
    """[rotary_dim / 2] fp32, on the CPU: radians per token of each pair of entries."""
    rotary_dim = rope.rotary_dim(head_dim)
    theta = rope.theta
    if isinstance(rope.scaling, DynamicScaling):
        theta = _stretched_theta(rope, rope.scaling.factor, rotary_dim, context_length)
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    plain = 1.0 / theta**exponent
    match rope.scaling:
        case LinearScaling(factor=factor):
            return plain / factor
        case Llama3Scaling():
            return _llama3(plain, rope.scaling)
        case YarnScaling():
            return _yarn(plain, rope.scaling, rotary_dim, rope.theta)
        case ProportionalScaling(factor=factor, share=share):
            kept = torch.arange(rotary_dim // 2) < int(share * rotary_dim // 2)
            return plain / factor * kept
        case LongropeScaling():
            return plain / _divisors(rope.scaling, rotary_dim, context_length)
        case _:
            return plain


def attention_factor(rope: RopeConfig, context_length: int) -> float:
    """The factor of cos and sin for the served context, which is 1 except for yarn and longrope."""
    if isinstance(rope.scaling, LongropeScaling):
        is_long = context_length > rope.scaling.original_length
        return (
            rope.scaling.long_attention_factor if is_long else rope.scaling.short_attention_factor
        )
    if not isinstance(rope.scaling, YarnScaling):
        return 1.0
    scaling = rope.scaling
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_magnitude(scaling.factor, scaling.mscale) / yarn_magnitude(
            scaling.factor, scaling.mscale_all_dim
        )
    return yarn_magnitude(scaling.factor, 1.0)


def yarn_magnitude(factor: float, weight: float) -> float:
    """How much yarn makes the scores of texts `factor` times as long larger, to the power of a
    half; `weight` is the config's mscale or mscale_all_dim."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _stretched_theta(
    rope: RopeConfig, factor: float, rotary_dim: int, context_length: int
) -> float:
    """The base of NTK-aware scaling for the length that is served.

    theta * (factor * length / trained - (factor - 1)) ** (R / (R - 2))
    """
    if rotary_dim == 2:  # a single pair turns by one radian per token, whatever the base
        return rope.theta
    length = max(context_length, rope.trained_length)
    growth = factor * length / rope.trained_length - (factor - 1)
    return float(rope.theta * growth ** (rotary_dim / (rotary_dim - 2)))


def _divisors(scaling: LongropeScaling, rotary_dim: int, context_length: int) -> Tensor:
    """[rotary_dim / 2]: those of the served context; ConfigError if there are too few or many."""
    divisors = scaling.long if context_length > scaling.original_length else scaling.short
    if len(divisors) != rotary_dim // 2:
        raise ConfigError(
            f"the config's longrope has {len(divisors)} factors, but a head of this model rotates "
            f"{rotary_dim // 2} pairs of entries"
        )
    return torch.tensor(divisors, dtype=torch.float32)


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Slow the pairs with up to `low` waves in the original length, and keep those from `high` on.

    The pairs in between are blended.
    """
    num_waves = scaling.original_length * plain / (2 * math.pi)
    kept = ((num_waves - scaling.low) / (scaling.high - scaling.low)).clamp(0.0, 1.0)
    return (1 - kept) * plain / scaling.factor + kept * plain


def _yarn(plain: Tensor, scaling: YarnScaling, rotary_dim: int, theta: float) -> Tensor:
    """Keep the pairs below the range of the two betas, slow those above, ramp between."""

    def pair_that_turns(num_rotations: float) -> float:
        wave_length = scaling.original_length / (num_rotations * 2 * math.pi)
        return rotary_dim * math.log(wave_length) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    width = last - first or 0.001  # a step, where the two fall together
    pair = torch.arange(rotary_dim // 2, dtype=torch.float32)
    slowed = ((pair - first) / width).clamp(0.0, 1.0)
    return plain / scaling.factor * slowed + plain * (1 - slowed)
