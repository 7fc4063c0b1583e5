"""Moves factors from the inputs of a layer into its weights, so that rounding costs less.

The norm or linear layer that makes a layer's inputs is divided by a factor per input, and the
weights that read these inputs are multiplied by it. The function stays the same, but its numbers
are easier to round. If inputs are rounded too, factors even out inputs and weights (SmoothQuant:
Xiao et al. 2022, arXiv:2211.10438); if only weights are rounded, factors make the weights of large
inputs more exact (AWQ: Lin et al. 2023, arXiv:2306.00978). The size of the factors is searched per
place, on a sample of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.convert.calibration import InputSample
from sapwood.convert.rounding import choose_grid, scale_format
from sapwood.convert.scheme import WeightScheme
from sapwood.convert.tapped import rounded_inputs
from sapwood.models.config import DecoderConfig

EXPONENTS = tuple(step / 10 for step in range(11))
SMALLEST = 1e-5
"""Smallest magnitude from which a factor is computed: an input that is always 0 needs one too."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place where factors can be moved, by names within a decoder layer.

    maker    the norm or linear layer that makes the inputs
    readers  the linear layers that read the inputs
    """

    maker: str
    readers: tuple[str, ...]


PLACES = (
    Place("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Place("self_attn.v_proj", ("self_attn.o_proj",)),
    Place("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Place("mlp.up_proj", ("mlp.down_proj",)),
)
"""The places in the layers of architectures that can be rescaled."""


class Rescaler:
    """Rescales one decoder layer after the other.

    converted  names of linear layers that are rounded; a place with any other reader is left alone
    """

    def __init__(
        self, decoder: DecoderConfig, scheme: WeightScheme, converted: frozenset[str]
    ) -> None:
        self._heads_per_kv = decoder.num_heads // decoder.num_kv_heads
        self._head_dim = decoder.head_dim
        self._scheme = scheme
        self._converted = converted

    def rescaled(
        self, prefix: str, tensors: Mapping[str, Tensor], samples: Mapping[str, InputSample]
    ) -> dict[str, Tensor]:
        """The layer's tensors by whole names; changed ones of linear layers are fp32."""
        found = dict(tensors)
        for place in PLACES:
            readers = [f"{prefix}.{name}" for name in place.readers]
            maker = f"{prefix}.{place.maker}"
            of_norm = f"{maker}.weight" in found and found[f"{maker}.weight"].dim() == 1
            linears = readers if of_norm else [maker, *readers]
            if self._converted.issuperset(linears):
                self._move(found, maker, readers, samples[readers[0]])
        return found

    def _move(
        self, tensors: dict[str, Tensor], maker: str, readers: list[str], inputs: InputSample
    ) -> None:
        device = inputs.largest.device
        weights = [tensors[f"{name}.weight"].to(device).float() for name in readers]
        factors = self._best_factors(torch.cat(weights), inputs, maker)
        made = tensors[f"{maker}.weight"]
        if made.dim() == 1:
            # The divided norm is rounded to its dtype; the exact factor comes from the result.
            divided = (made.to(device).float() / factors).to(made.dtype)
            kept = divided != 0
            factors = torch.where(kept, made.to(device).float() / divided.float(), 1.0)
            tensors[f"{maker}.weight"] = torch.where(kept, divided, made.to(device)).to(made.device)
        else:
            rows = self._rows(factors, maker)
            tensors[f"{maker}.weight"] = made.to(device).float() / rows[:, None]
            if f"{maker}.bias" in tensors:
                bias = tensors[f"{maker}.bias"]
                tensors[f"{maker}.bias"] = (bias.to(device).float() / rows).to(bias.dtype)
        for name, weight in zip(readers, weights, strict=True):
            tensors[f"{name}.weight"] = weight * factors

    def _best_factors(self, weight: Tensor, inputs: InputSample, maker: str) -> Tensor:
        """[in]: the candidate with the smallest error of the outputs of the sample."""
        sample = inputs.rows
        exact = sample @ weight.t()
        best_error, best = torch.inf, torch.ones_like(inputs.largest)
        for exponent in EXPONENTS:
            factors = self._shared(self._factors(weight, inputs, sample, exponent), maker)
            error = (self._rounded_output(weight * factors, sample / factors) - exact).square_()
            total = error.sum().item()
            if total < best_error:
                best_error, best = total, factors
        return best

    def _factors(
        self, weight: Tensor, inputs: InputSample, sample: Tensor, exponent: float
    ) -> Tensor:
        if self._scheme.rounds_activations:
            large = inputs.largest.clamp(min=SMALLEST)
            heavy = weight.abs().amax(dim=0).clamp(min=SMALLEST)
            # With exponent 0 weights alone decide; leaving everything unscaled is a candidate too.
            factors = torch.ones_like(large)
            if exponent > 0:
                factors = large**exponent / heavy ** (1 - exponent)
        else:
            factors = sample.abs().mean(dim=0).clamp(min=SMALLEST) ** exponent
        return factors / (factors.amax() * factors.amin()).sqrt()

    def _shared(self, factors: Tensor, maker: str) -> Tensor:
        """One factor per entry for all query heads that read the same value head: the largest."""
        if not maker.endswith("v_proj"):
            return factors
        heads = factors.view(-1, self._heads_per_kv, self._head_dim)
        return heads.amax(dim=1, keepdim=True).expand_as(heads).reshape(-1)

    def _rows(self, factors: Tensor, maker: str) -> Tensor:
        """The factors of a maker's output rows."""
        if not maker.endswith("v_proj"):
            return factors
        return factors.view(-1, self._heads_per_kv, self._head_dim)[:, 0].reshape(-1)

    def _rounded_output(self, weight: Tensor, x: Tensor) -> Tensor:
        scales = scale_format(self._scheme, weight, torch.float32)
        grid = choose_grid(weight, self._scheme, importance=None, scales=scales, shares=(1.0,))
        rounded = grid.values(grid.codes(weight))
        if self._scheme.rounds_activations:
            x = rounded_inputs(x, self._scheme)
        return x @ rounded.t()
