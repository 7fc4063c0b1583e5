"""Checks of layers that keep a state: outputs, and the states that they leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.conformance.checks import Case, Checks, Pair
from sapwood.kernels.interface import Kernels
from sapwood.kernels.state_forms import DeltaForm, GatedNormForm
from sapwood.kernels.state_space import StateSpace

CHECKS = Checks()

NUM_SLOTS = 5
REQUESTS = ((1, 7), (6, 6), (3, 20))
"""(new tokens, tokens) of a decode, a new prompt, and a later chunk."""
NUM_TOKENS = sum(num_new for num_new, _ in REQUESTS)


def batch_of(requests: Sequence[tuple[int, int]], device: torch.device) -> AttentionBatch:
    """The lengths of a step, without pages."""
    query_lens = tuple(num_new for num_new, _ in requests)
    context_lens = tuple(length for _, length in requests)
    return AttentionBatch(
        page_table=torch.zeros(len(requests), 1, dtype=torch.int32, device=device),
        query_start=torch.tensor((0, *query_lens)).cumsum(0).to(torch.int32).to(device),
        context_len=torch.tensor(context_lens, dtype=torch.int32, device=device),
        query_lens=query_lens,
        context_lens=context_lens,
        num_decodes=query_lens.count(1),
    )


def _both(
    case: Case,
    kernels: Kernels,
    reference: Kernels,
    states: Tensor,
    run: Callable[[Kernels, Tensor, Tensor, AttentionBatch], Tensor],
) -> Iterator[Pair]:
    """The outputs of both, and the states of the slots afterwards."""
    slots = torch.tensor([3, 0, 4], device=case.device)
    mine, its = states.clone(), states.clone()
    yield (
        run(kernels, mine, slots, batch_of(REQUESTS, case.device)),
        run(reference, its, slots, batch_of(REQUESTS, case.device)),
    )
    yield mine, its


@CHECKS.add("causal_conv")
def _causal_conv(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    width, taps = case.hidden_size, 4
    x, weight, bias = case.randn(NUM_TOKENS, width), case.randn(width, taps), case.randn(width)
    states = case.randn(NUM_SLOTS, width, taps - 1)
    for silu in (False, True):

        def run(
            ops: Kernels, own: Tensor, slots: Tensor, batch: AttentionBatch, silu: bool = silu
        ) -> Tensor:
            return ops.causal_conv(x, weight, bias, own, slots, batch, silu=silu)

        yield from _both(case, kernels, reference, states, run)


@CHECKS.add("selective_scan")
def _selective_scan(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    """Mamba 2's form, and lightning attention's, without time steps."""
    heads, groups, size = 4, 2, 16
    for has_steps in (True, False):
        steps = case.randn(heads, dtype=torch.float32) if has_steps else None
        layer = StateSpace(
            num_heads=heads,
            head_dim=case.head_dim,
            num_groups=groups,
            state_size=size,
            rates=-case.randn(heads, dtype=torch.float32).abs(),
            dt_bias=steps,
            skip=steps,
        )
        x, b, c = (
            case.randn(NUM_TOKENS, columns)
            for columns in (layer.width, groups * size, groups * size)
        )
        dt = case.randn(NUM_TOKENS, heads) if has_steps else None
        states = case.randn(NUM_SLOTS, *layer.shape, dtype=torch.float32)

        def run(
            ops: Kernels,
            own: Tensor,
            slots: Tensor,
            batch: AttentionBatch,
            given: tuple[StateSpace, Tensor, Tensor, Tensor, Tensor | None] = (layer, x, b, c, dt),
        ) -> Tensor:
            layer, x, b, c, dt = given
            return ops.selective_scan(x, b, c, dt, layer, own, slots, batch)

        yield from _both(case, kernels, reference, states, run)


@CHECKS.add("gated_delta_rule")
def _gated_delta_rule(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    heads, dims = (2, 4), (16, 24)
    form = DeltaForm(
        num_key_heads=heads[0],
        num_heads=heads[1],
        key_dim=dims[0],
        value_dim=dims[1],
        rate=case.randn(heads[1], dtype=torch.float32).abs(),
        shift=case.randn(heads[1], dtype=torch.float32),
    )
    qkv, decay, write = (
        case.randn(NUM_TOKENS, columns) for columns in (form.num_channels, heads[1], heads[1])
    )
    states = case.randn(NUM_SLOTS, heads[1], *dims, dtype=torch.float32)

    def run(ops: Kernels, own: Tensor, slots: Tensor, batch: AttentionBatch) -> Tensor:
        return ops.gated_delta_rule(qkv.clone(), decay, write, form, own, slots, batch)

    yield from _both(case, kernels, reference, states, run)


@CHECKS.add("gated_rms_norm")
def _gated_rms_norm(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    x, gate = case.randn(9, case.hidden_size), case.randn(9, case.hidden_size)
    weight = case.randn(case.hidden_size)
    for norm_first in (True, False):
        form = GatedNormForm(group=case.hidden_size // 2, eps=1e-5, norm_first=norm_first)
        got, wanted = (
            ops.gated_rms_norm(x.clone(), gate, weight, form) for ops in (kernels, reference)
        )
        yield got, wanted
