"""The ops of a recorded step (kernels/recording.py) on states of requests, and beside these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from sapwood.kernels.recording_buffers import Buffer
    from sapwood.kernels.state_forms import DeltaForm, GatedNormForm
    from sapwood.kernels.state_space import StateSpace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Convolve:
    """out [rows, C] = the convolution of the columns of x from `first` on.

    layer   index of the layer, the first of whose tensors of states the convolution has
    weight  [C, L], or a buffer [rows, C * L] of each token's own; bias [C] or None, and silu, as in
            Kernels.causal_conv
    gated   whether these columns are [b, c, y], C each: then out = c * the convolution of b * y
    """

    x: Buffer
    layer: int
    weight: Tensor | Buffer
    bias: Tensor | None
    out: Buffer
    first: int = 0
    gated: bool = False
    silu: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GatedNorm:
    """out [rows, W] = the gated norm of x [rows, W], whose gate is W columns from `first` on.

    weight, form  as in Kernels.gated_rms_norm
    """

    x: Buffer
    gate: Buffer
    first: int
    weight: Tensor
    form: GatedNormForm
    out: Buffer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeltaRule:
    """out = the gated delta rule of qkv, as Kernels.gated_delta_rule has it.

    decay  has its inputs from column `decay_first` on; write likewise
    layer  index of the layer, the second of whose tensors of states the rule has
    """

    qkv: Buffer
    decay: Buffer
    decay_first: int
    write: Buffer
    write_first: int
    layer: int
    form: DeltaForm
    out: Buffer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SelectiveScan:
    """out [rows, H * P] = the scan of x, b, c, dt and gate, as Kernels.selective_scan has it.

    firsts  of each of these five: the first of its columns
    layer   index of the layer; `tensor` says which of its tensors of states the scan has
    """

    x: Buffer
    b: Buffer
    c: Buffer
    dt: Buffer | None
    gate: Buffer | None
    firsts: tuple[int, int, int, int, int]
    layer: int
    tensor: int
    space: StateSpace
    out: Buffer
