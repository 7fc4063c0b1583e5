"""How long a conversion will take on this machine, from short trials with random numbers."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch

from sapwood.convert.calibration import SAMPLE_WINDOWS, input_moments
from sapwood.convert.gptq import gptq_codes
from sapwood.convert.options import ConvertOptions
from sapwood.convert.plan import Plan
from sapwood.convert.rounding import choose_grid, scale_format
from sapwood.convert.tapped import TappedLinear
from sapwood.convert.walk import Walk
from sapwood.models.config import DecoderConfig

TRIAL_ROWS = 512
"""Outputs of a layer that a trial rounds."""


@torch.inference_mode()
def estimate_s(
    walk: Walk,
    plan: Plan,
    options: ConvertOptions,
    decoder: DecoderConfig,
    *,
    calibration_windows: int,
    measured_windows: int,
) -> float:
    """Seconds for all decoder layers and the measurement, without reading the checkpoint.

    Trials compute one decoder layer for one window, and round a part of each of its linear layers.
    """
    prefixes = [f"{walk.names.layer(index)}." for index in range(walk.num_layers)]
    index, prefix = next(
        (index, prefix)
        for index, prefix in enumerate(prefixes)
        if any(name.startswith(prefix) for name in plan.converted)
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
        for name, shape in plan.shapes.items()
        if name.startswith(prefix)
    }
    layer = walk.layer(index, tensors)
    window = torch.randn(options.window, decoder.hidden_size, generator=generator)
    hidden = [window.to(walk.device, walk.dtype)]
    walk.run(layer, hidden)  # not counted: the first use of a kernel may prepare much
    pass_s = _seconds(lambda: walk.run(layer, hidden))
    passes = 2 * measured_windows
    if options.needs_calibration:
        fitted_to_original = options.rounding == "gptq" and not plan.scheme.rounds_activations
        passes += calibration_windows * (1 + fitted_to_original)
        passes += min(calibration_windows, SAMPLE_WINDOWS) if options.rescales else 0
    # The output layer is computed once for the original and once for the converted model.
    head_numbers = decoder.vocab_size * decoder.hidden_size
    head_share = head_numbers / sum(tensor.numel() for tensor in tensors.values())
    total_s = pass_s * (passes * decoder.num_layers + 2 * measured_windows * head_share)
    converted = [one for one in layer.linears if plan.converted.issuperset(one.names)]
    # Layers of the same shape, as all experts' are, take as long.
    by_shape = Counter((sum(map(len, one.weights)), one.in_size) for one in converted)
    tried = {(sum(map(len, one.weights)), one.in_size): one for one in converted}
    rounding_s = math.fsum(
        count * _rounding_s(tried[shape], plan, options, walk, calibration_windows)
        for shape, count in by_shape.items()
    )
    num_names = sum(len(one.names) for one in converted)
    return total_s + rounding_s * len(plan.converted) / num_names


def _rounding_s(
    linear: TappedLinear, plan: Plan, options: ConvertOptions, walk: Walk, num_windows: int
) -> float:
    """Seconds to sum up the inputs of a linear layer, and to round its weights."""
    weight = torch.cat([part.to(walk.device) for part in linear.weights])
    part = weight[:TRIAL_ROWS]
    scale_up = len(weight) / len(part)
    scales = scale_format(plan.scheme, part, torch.float32)
    choose = partial(choose_grid, scheme=plan.scheme, importance=None, scales=scales)
    if options.rounding != "gptq":
        return _seconds(lambda: choose(part)) * scale_up
    inputs = [torch.randn(options.window, linear.in_size, device=walk.device, dtype=walk.dtype)]
    moments = input_moments(inputs, inputs, plan.scheme)
    sums_s = _seconds(lambda: input_moments(inputs, inputs, plan.scheme))
    rounding_s = _seconds(
        lambda: gptq_codes(part, moments.hessian, choose, act_order=True, damping=1.0)
    )
    return sums_s * num_windows + rounding_s * scale_up


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
