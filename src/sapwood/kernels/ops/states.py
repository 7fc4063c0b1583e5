"""Layers that keep a state: convolutions, state space layers and gated delta rules."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.state_forms import DeltaForm, GatedNormForm
from sapwood.kernels.state_space import StateSpace


class StateOps(Protocol):
    """See `Kernels` (kernels/interface.py) for what the letters of the shapes stand for."""

    def causal_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        states: Tensor,
        slots: Tensor,
        batch: AttentionBatch,
        *,
        silu: bool = False,
    ) -> Tensor:
        """Convolution of each channel over the last L inputs of its request: out[t] is the bias
        plus the sum over i of weight[:, i] * input[t - L + 1 + i]; with `silu`, SiLU of that.

        x        [T, C]: the inputs of the new tokens
        weight   [C, L], the newest input's factor last, or [T, C, L], those of each token's output;
                 bias [C] or None
        states   [num_slots, C, L - 1] of x's dtype: a request's newest inputs before this step, the
                 newest last; overwritten with the newest ones after it
        slots    [R] int64: which state is whose; different ones
        batch    of it the lengths. A request whose new tokens are all of its tokens begins with
                 zeros, whatever its state holds
        Returns  [T, C]
        Source: Gu and Dao 2023, arXiv:2312.00752 (the convolution of Mamba)."""
        ...

    def selective_scan(
        self,
        x: Tensor,
        b: Tensor,
        c: Tensor,
        dt: Tensor | None,
        layer: StateSpace,
        states: Tensor,
        slots: Tensor,
        batch: AttentionBatch,
        *,
        gate: Tensor | None = None,
    ) -> Tensor:
        """A state space layer. Of each head, state = exp(rate * step) * state + key * (step *
        value), and then the output is query @ state + skip * value, token by token; a token's step
        is softplus(dt + dt_bias), cut to the layer's range. Computed in fp32.

        x        [T, H * P]: the values, one of P entries per head
        b, c     [T, G * N]: the keys and the queries of the groups of heads
        dt       [T, as many as `layer.num_steps`]; None: the layer has no time steps
        states   [num_slots, H, N, P], fp32 or bf16; overwritten as in causal_conv
        gate     [T, H * P]: SiLU of it multiplies the output; None: nothing does
        slots, batch  as in causal_conv
        Returns  [T, H * P]; rows of inputs may lie apart, but not entries of a row
        Sources  Gu and Dao 2023, arXiv:2312.00752; Dao and Gu 2024, arXiv:2405.21060; Qin et al.
                 2024, arXiv:2401.04658 (lightning attention)"""

    def gated_rms_norm(
        self, x: Tensor, gate: Tensor, weight: Tensor, form: GatedNormForm
    ) -> Tensor:
        """RMSNorms of groups of columns and a gate, as `form` says, in fp32.

        x [T, W]; gate [T, W] of the same dtype, whose rows may lie apart; weight [W] of that dtype
        Returns  [T, W]
        Raises   ValueError if groups of form.group columns do not fill W
        Source: Sun et al. 2023, arXiv:2307.08621; Dao and Gu 2024, arXiv:2405.21060."""
        ...

    def gated_delta_rule(
        self,
        qkv: Tensor,
        decay: Tensor,
        write: Tensor,
        form: DeltaForm,
        states: Tensor,
        slots: Tensor,
        batch: AttentionBatch,
    ) -> Tensor:
        """Linear attention whose state S [key_dim, value_dim] per head forgets, and then corrects
        what it would have answered to the newest key. For each token, with queries and keys of
        length 1, g = e^(-rate * softplus(decay + shift)), or as form.lowest says, and
        b = write_scale * logistic(write):

            S = g * S                              (g per head, or per row of S)
            S = S + k (b * (v - k^T S))^T
            out = q^T S / sqrt(key_dim)

        All of it is computed in fp32.

        qkv     [T, form.num_channels]: all queries, all keys, all values
        decay   [T, as many as form.shift], and write [T, H]: their inputs; rows may lie apart
        states  [num_slots, H, key_dim, value_dim] fp32 or bf16, rounded to that after the step
        slots   [R] int64, and batch, as for `causal_conv`
        Returns [T, H * value_dim] of qkv's dtype
        Source: Yang et al. 2024, arXiv:2412.06464; per channel: Kimi Team 2025, arXiv:2510.26692.
        """
        ...
