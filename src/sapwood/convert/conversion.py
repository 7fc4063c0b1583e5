"""Converts a checkpoint to fewer bits, one decoder layer after the other.

Two texts go through the model at the same time, layer by layer. The calibration text goes through
the converted layers, so that each linear layer is fitted to the inputs that it will get. If inputs
are not rounded, this text goes through the original layers too, and a layer is fitted to its output
there. If inputs are rounded, the errors of earlier layers are mostly noise, and correcting them
costs more than it brings. The measured text goes through the original and through the converted
layers, so that both perplexities are known at the end. Only one layer at a time is held in the
dtype of the computation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError, WeightError
from sapwood.convert.calibration import (
    Moments,
    input_moments,
    sample_inputs,
)
from sapwood.convert.gptq import gptq_codes
from sapwood.convert.layouts import quantization_config, stored_tensors
from sapwood.convert.options import DEFAULT_DAMPING, ConvertOptions
from sapwood.convert.plan import Plan
from sapwood.convert.rescale import Rescaler
from sapwood.convert.rounding import (
    Grid,
    choose_grid,
    scale_format,
)
from sapwood.convert.tapped import TappedLinear
from sapwood.convert.walk import TappedLayer, Walk
from sapwood.convert.writer import ShardWriter, copy_side_files, write_json
from sapwood.models.config import DecoderConfig
from sapwood.models.loader.fused_experts import FusedExperts
from sapwood.models.loader.weights import iterate_weights
from sapwood.store import ModelFiles, Progress
from sapwood.store.progress import stage

GB = 10**9
LOST_SHARE = 0.5
"""Share of the inputs' loss by earlier layers' rounding that the weights make up for.

A calibration text's measure of that loss is partly chance. Making up for all of it costs SmolLM2
9.1% of perplexity in int4 after 8,192 tokens, for a half 6.0%, for a quarter 6.4%; in MXFP4 16.7%,
11.2% and 9.3%, and 12.4% for nothing.
"""


LEAST_TOKENS = 64
"""Tokens of the calibration text that must have chosen an expert for it to be fitted to them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Windows of token ids, all of one length.

    calibration  windows to which weights are fitted; empty: they are not fitted
    measured     windows on which perplexity is measured; empty: it is not measured
    """

    calibration: Sequence[Tensor]
    measured: Sequence[Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """How far a converted layer is from the original.

    weight_error  |W - Q| / |W|, in Frobenius norms
    output_error  |x (W - Q)| / |x W| over the calibration text's inputs x, before inputs are
                  rounded; None if gptq did not look at them
    """

    name: str
    weight_error: float
    output_error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """The result of a conversion.

    bytes_before, bytes_after      size of all tensors
    perplexity_before, …_after     None: not measured
    num_scored_tokens              tokens over which the perplexities are the mean
    """

    bytes_before: int
    bytes_after: int
    layers: list[LayerError]
    perplexity_before: float | None
    perplexity_after: float | None
    num_scored_tokens: int
    seconds: float


@dataclass(slots=True)
class _Streams:
    """Hidden states of all windows on their way through the layers.

    There are those of the calibration text and of the measured text, each in the original and in
    the converted model.
    """

    calibration_original: list[Tensor]
    calibration: list[Tensor]
    original: list[Tensor]
    converted: list[Tensor]


class Converter:
    """Converts one model; see `convert`."""

    def __init__(
        self,
        walk: Walk,
        decoder: DecoderConfig,
        plan: Plan,
        options: ConvertOptions,
        writer: ShardWriter,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._walk = walk
        self._plan = plan
        self._options = options
        self._writer = writer
        self._device = device
        self._dtype = dtype
        self._rescaler = Rescaler(decoder, plan.scheme, plan.converted)
        self.layers: list[LayerError] = []

    @torch.inference_mode()
    def convert(
        self, tensors: dict[str, Tensor], texts: Texts, progress: Progress
    ) -> tuple[float, float] | None:
        """Convert and write all tensors, which are taken out of the table.

        Returns the mean negative log-likelihoods of the measured text before and after, in nats, if
        there is such a text.
        """
        streams = _Streams(
            calibration_original=self._walk.embed(tensors, texts.calibration),
            calibration=self._walk.embed(tensors, texts.calibration),
            original=self._walk.embed(tensors, texts.measured),
            converted=self._walk.embed(tensors, texts.measured),
        )
        names = self._walk.names
        embedding = f"{names.embedding}.weight"
        self._writer.add(embedding, tensors[embedding])
        for index in range(self._walk.num_layers):
            prefix = f"{names.layer(index)}."
            own = {name: tensors.pop(name) for name in self._plan.shapes if name.startswith(prefix)}
            self._convert_layer(index, own, streams)
            progress.advance(sum(tensor.nbytes for tensor in own.values()))
        rest = [name for name in self._plan.shapes if name in tensors]
        for name in rest:
            if name != embedding:
                self._writer.add(name, tensors[name])
        measured = None
        if texts.measured:
            before, after = (
                self._walk.negative_log_likelihood(tensors, hidden, texts.measured)
                for hidden in (streams.original, streams.converted)
            )
            measured = before, after
        progress.advance(sum(tensors[name].nbytes for name in rest))
        return measured

    def _convert_layer(self, index: int, tensors: dict[str, Tensor], streams: _Streams) -> None:
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise WeightError(f"{name} has numbers that are not finite; nothing can be made")
        layer = self._walk.layer(index, tensors)
        streams.original = self._walk.run(layer, streams.original)
        if self._options.rescales:
            samples = sample_inputs(self._walk, layer, streams.calibration)
            tensors = self._rescaler.rescaled(self._walk.names.layer(index), tensors, samples)
            layer = self._walk.layer(index, tensors)
        if self._options.rounding == "gptq":
            self._fit(index, tensors, layer, streams)
        else:
            for linear in self._converted(layer):
                self._convert_linear(linear, None)
            streams.calibration = self._walk.run(layer, streams.calibration)
        for name, tensor in tensors.items():
            if name.removesuffix(".weight") not in self._plan.converted:
                self._writer.add(name, tensor.to(self._dtype))
        streams.converted = self._walk.run(layer, streams.converted)

    def _converted(self, layer: TappedLayer) -> list[TappedLinear]:
        return [one for one in layer.linears if self._plan.converted.issuperset(one.names)]

    def _fit(
        self, index: int, tensors: dict[str, Tensor], layer: TappedLayer, streams: _Streams
    ) -> None:
        """Convert a decoder layer's linear layers in turn, each fitted to the inputs it then gets.

        The calibration text goes through the original layer at the same pace, unless inputs are
        rounded.
        """
        converted = self._converted(layer)
        steps = self._walk.steps(layer, streams.calibration)
        original_steps = None
        if not self._plan.scheme.rounds_activations:
            original = self._walk.layer(index, tensors)
            original_steps = self._walk.steps(original, streams.calibration_original)
        for linear in layer.linears:
            received = next(steps)
            originals = received if original_steps is None else next(original_steps)
            if linear in converted:
                self._convert_linear(linear, self._moments(received, originals))
        streams.calibration = list(next(steps))
        if original_steps is not None:
            streams.calibration_original = list(next(original_steps))

    def _moments(self, received: Sequence[Tensor], originals: Sequence[Tensor]) -> Moments | None:
        """What is known of a linear layer's inputs; None: too little.

        Other tokens may choose an expert in the converted model than in the original one; such an
        expert is fitted to what it gets."""
        if sum(map(len, received)) < LEAST_TOKENS:
            return None
        num_tokens = self._options.window
        is_same = all(len(x) == num_tokens for x in (*received, *originals))
        return input_moments(received, originals if is_same else received, self._plan.scheme)

    def _convert_linear(self, linear: TappedLinear, inputs: Moments | None) -> None:
        """Round and write the parts of a linear layer, and let it compute with the written weights.

        inputs  None: each weight is rounded for itself
        """
        scheme = self._plan.scheme
        # One above the other: the parts have the same inputs, and are computed together.
        weight = torch.cat([part.to(self._device).float() for part in linear.weights])
        hessian = None if inputs is None else inputs.hessian
        codes, grid = self._codes(weight, inputs)
        values = grid.values(codes)
        first = 0
        for name, part in zip(linear.names, linear.weights, strict=True):
            rows = slice(first, first + len(part))
            first = rows.stop
            for suffix, tensor in stored_tensors(codes[rows], grid.rows(rows), self._dtype).items():
                self._writer.add(f"{name}.{suffix}", tensor)
            self.layers.append(_error(name, weight[rows], values[rows], hessian))
        if scheme.rounds_activations and scheme.strategy == "channel":
            linear.use_rounded(scheme, codes, grid.scale[:, 0])
        elif scheme.rounds_activations:
            linear.use_block_rounded(scheme, values)
        else:
            linear.use(values)

    def _codes(self, weight: Tensor, inputs: Moments | None) -> tuple[Tensor, Grid]:
        scheme, options = self._plan.scheme, self._options
        scales = scale_format(scheme, weight, self._dtype)
        choose = partial(choose_grid, scheme=scheme, scales=scales)
        if inputs is None:
            grid = choose(weight, importance=None)
            return grid.codes(weight), grid
        return gptq_codes(
            weight,
            inputs.hessian,
            partial(choose, importance=inputs.hessian.diagonal()),
            lost=inputs.lost if scheme.rounds_activations else LOST_SHARE * inputs.lost,
            act_order=options.act_order is not False,
            damping=options.damping or DEFAULT_DAMPING,
        )


def convert(
    walk: Walk,
    files: ModelFiles,
    config: Mapping[str, Any],
    decoder: DecoderConfig,
    plan: Plan,
    options: ConvertOptions,
    texts: Texts,
    directory: Path,
    *,
    stored_dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> Conversion:
    """Write the converted model into an existing, empty directory.

    config        the contents of the model's config.json
    stored_dtype  dtype of all tensors that are not converted, and of scales
    Raises        WeightError if the checkpoint does not fit the plan
    """
    start = time.perf_counter()
    tensors = _read(files, plan, stored_dtype)
    writer = ShardWriter(directory, int(options.max_shard_size * GB))
    converter = Converter(walk, decoder, plan, options, writer, device=device, dtype=stored_dtype)
    before, _ = plan.num_bytes(stored_dtype)
    with stage(progress, f"converting {files.name} to {options.scheme}", before):
        measured = converter.convert(tensors, texts, progress)
    writer.finish()
    act_order = options.rounding == "gptq" and options.act_order is not False
    quantization = quantization_config(
        plan.scheme, plan.ignored, act_order=act_order, dtype=stored_dtype
    )
    dtype = str(stored_dtype).removeprefix("torch.")
    own = {name: value for name, value in config.items() if name != "torch_dtype"}
    write_json(
        directory / "config.json", {**own, "dtype": dtype, "quantization_config": quantization}
    )
    copy_side_files(files.path, directory)
    return Conversion(
        bytes_before=before,
        bytes_after=writer.num_bytes,
        layers=converter.layers,
        perplexity_before=None if measured is None else math.exp(measured[0]),
        perplexity_after=None if measured is None else math.exp(measured[1]),
        num_scored_tokens=sum(len(window) - 1 for window in texts.measured),
        seconds=time.perf_counter() - start,
    )


def cut(token_ids: Sequence[int], *, window: int, num_tokens: int, spread: bool) -> list[Tensor]:
    """Whole windows with at most that many tokens, from the text's beginning or spread over it.

    Raises ConfigError if the text is shorter than a window."""
    available = len(token_ids) // window
    if available == 0:
        raise ConfigError(
            f"a text has {len(token_ids)} tokens, less than one --window of {window}; give a "
            "longer text or a shorter window"
        )
    count = min(available, num_tokens // window)
    chosen: Iterator[int] = iter(range(count))
    if spread:
        chosen = (index * available // count for index in range(count))
    tokens = torch.tensor(token_ids, dtype=torch.int64)
    return [tokens[index * window : (index + 1) * window] for index in chosen]


def _read(files: ModelFiles, plan: Plan, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors; those of safetensors files in that dtype stay in the file until their use."""
    found: dict[str, Tensor] = {}
    fused = FusedExperts(plan.targets)
    stored = iterate_weights(files, dtype=dtype)
    for name, tensor in fused.split((plan.name_of(name), tensor) for name, tensor in stored):
        if name in found:
            raise WeightError(f"{files.name} has {name} twice")
        found[name] = tensor
    plan.check_names(found)
    return found


def _error(name: str, weight: Tensor, values: Tensor, hessian: Tensor | None) -> LayerError:
    difference = weight - values
    output_error = None
    if hessian is not None:
        squares = [torch.sum((each @ hessian) * each).item() for each in (difference, weight)]
        output_error = math.sqrt(max(squares[0], 0.0) / squares[1]) if squares[1] > 0 else 0.0
    norm = weight.norm().item()
    return LayerError(
        name=name,
        weight_error=difference.norm().item() / norm if norm else 0.0,
        output_error=output_error,
    )
