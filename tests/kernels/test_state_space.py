"""State space layers: the definition, however a text is cut into chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.state_space import StateSpace
from sapwood.kernels.torch_ops import TorchKernels
from tests.kernels.test_convolution import batch_of, native_or_skip

NUM_SLOTS = 5


def layer_of(
    kind: str, *, heads: int = 4, head_dim: int = 8, groups: int = 2, state_size: int = 6
) -> StateSpace:
    """Of Mamba 2, of Mamba 1, or of lightning attention."""
    if kind == "lightning":
        rates = -torch.rand(heads)
        return StateSpace(
            num_heads=heads, head_dim=head_dim, num_groups=heads, state_size=state_size, rates=rates
        )
    own = kind == "mamba 1"
    shape = (heads, state_size, head_dim) if own else (heads,)
    steps = heads * head_dim if own else heads
    return StateSpace(
        num_heads=heads, head_dim=head_dim, num_groups=1 if own else groups, state_size=state_size,
        rates=-2.0 * torch.rand(shape), dt_bias=torch.randn(steps), skip=torch.randn(steps),
        dt_range=(0.0, float("inf")) if own else (0.3, 1.5),
    )  # fmt: skip


@dataclass(frozen=True)
class Text:
    """Inputs of one text."""

    x: Tensor
    b: Tensor
    c: Tensor
    dt: Tensor | None
    gate: Tensor | None = None

    def part(self, start: int, stop: int) -> Text:
        dt, gate = (None if one is None else one[start:stop] for one in (self.dt, self.gate))
        return Text(self.x[start:stop], self.b[start:stop], self.c[start:stop], dt, gate)


def text_of(layer: StateSpace, length: int, dtype: torch.dtype = torch.float32) -> Text:
    """Rows of the inputs lie apart, as slices of one projection do."""
    keys = layer.num_groups * layer.state_size
    sizes = [layer.width, keys, keys, layer.num_steps, layer.width]
    x, b, c, dt, gate = torch.randn(length, sum(sizes)).to(dtype).split(sizes, dim=1)
    has_gate = layer.has_own_rates  # as Mamba 1 has
    return Text(x, b, c, dt if layer.has_steps else None, gate if has_gate else None)


def joined(texts: Sequence[Text]) -> Text:
    dts = [text.dt for text in texts if text.dt is not None]
    gates = [text.gate for text in texts if text.gate is not None]
    return Text(
        torch.cat([text.x for text in texts]),
        torch.cat([text.b for text in texts]),
        torch.cat([text.c for text in texts]),
        torch.cat(dts) if dts else None,
        torch.cat(gates) if gates else None,
    )


def defined(layer: StateSpace, text: Text) -> tuple[Tensor, Tensor]:
    """Outputs [T, H * P] and the last state of one text, as matrices over all pairs of tokens, in
    double precision."""
    heads, size, width = layer.shape
    length, repeat = len(text.x), heads // layer.num_groups
    values = text.x.double().view(length, heads, width)
    keys, queries = (
        part.double().reshape(length, layer.num_groups, size).repeat_interleave(repeat, dim=1)
        for part in (text.b, text.c)
    )
    steps = torch.ones(length, heads, 1, dtype=torch.float64)
    if text.dt is not None and layer.dt_bias is not None:
        raw = text.dt.double() + layer.dt_bias.double()
        steps = torch.log1p(raw.exp()).clamp(*layer.dt_range).view(length, heads, -1)
    rates = layer.rates.double().view(heads, size if layer.has_own_rates else 1, -1)
    total = (rates * steps.unsqueeze(2)).cumsum(dim=0)  # [T, H, N or 1, P or 1]
    out, last = torch.zeros_like(values), None
    for token in range(length):
        left = (total[token] - total[: token + 1]).exp()
        fed = keys[: token + 1].unsqueeze(3) * (values * steps)[: token + 1].unsqueeze(2)
        last = (left * fed).sum(dim=0)
        out[token] = (queries[token].unsqueeze(2) * last).sum(dim=1)
    out = out.view(length, layer.width)
    if layer.skip is not None:
        skip = layer.skip.double()
        out += text.x.double() * (skip if layer.has_own_rates else skip.repeat_interleave(width))
    if text.gate is not None:
        out *= torch.nn.functional.silu(text.gate.double())
    assert last is not None
    return out, last


def run_steps(
    kernels: Kernels,
    layer: StateSpace,
    texts: Sequence[Text],
    steps: Sequence[dict[int, int]],
    state_dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], Tensor]:
    """Each step gives some texts a number of their next tokens; a state is NaN before its text."""
    pool = torch.full((NUM_SLOTS, 2, *layer.shape), torch.nan, dtype=state_dtype)
    states, slots = pool[:, 1], torch.randperm(NUM_SLOTS)[: len(texts)]
    done = [0] * len(texts)
    found: list[list[Tensor]] = [[] for _ in texts]
    for step in steps:
        order = sorted(step, key=lambda text: step[text] > 1)  # decodes first
        lens = [step[text] for text in order]
        new = joined([texts[text].part(done[text], done[text] + step[text]) for text in order])
        for text in order:
            done[text] += step[text]
        batch = batch_of(lens, [done[text] for text in order])
        out = kernels.selective_scan(
            new.x, new.b, new.c, new.dt, layer, states, slots[order], batch, gate=new.gate
        )
        assert out.dtype == new.x.dtype
        for text, part in zip(order, out.split(lens), strict=True):
            found[text].append(part)
    unused = [slot for slot in range(NUM_SLOTS) if slot not in slots.tolist()]
    assert states[unused].isnan().all()
    assert pool[:, 0].isnan().all()
    return [torch.cat(parts) for parts in found], states[slots]


KINDS = ["mamba 2", "mamba 1", "lightning"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_and_decodes_give_what_the_definition_does(
    any_kernels: Kernels, kind: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    layer = layer_of(kind)
    texts = [text_of(layer, length, dtype) for length in (11, 5, 70)]
    steps = [{0: 1, 1: 1, 2: 66}, {0: 6, 1: 3}, {0: 1, 1: 1, 2: 1}, {2: 3, 0: 3}]
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for kernels in (any_kernels, ReferenceKernels()):
        outs, states = run_steps(kernels, layer, texts, steps)
        for text, out, state in zip(texts, outs, states, strict=True):
            wanted, last = defined(layer, text)
            torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(state.double(), last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 63, 64, 65])
def test_steps_equal_the_whole(any_kernels: Kernels, kind: str, size: int) -> None:
    torch.manual_seed(2)
    layer = layer_of(kind)
    texts = [text_of(layer, 140)]
    (whole,), last = run_steps(any_kernels, layer, texts, [{0: 140}])
    sizes = [min(size, 140 - start) for start in range(0, 140, size)]
    (got,), state = run_steps(any_kernels, layer, texts, [{0: one} for one in sizes])
    torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("head_dim", "state_size"), [(1, 1), (24, 5), (64, 128), (80, 16), (37, 3)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_compiled_op_has_any_sizes(
    kind: str, head_dim: int, state_size: int, threads: int
) -> None:
    """And the same bits, however the text is cut."""
    torch.manual_seed(3)
    layer = layer_of(kind, head_dim=head_dim, state_size=state_size)
    texts, kernels = [text_of(layer, 70), text_of(layer, 40)], native_or_skip(threads)
    outs, states = run_steps(kernels, layer, texts, [{0: 70, 1: 40}])
    others, ends = run_steps(kernels, layer, texts, [{0: 1}, {0: 30, 1: 1}, {0: 39, 1: 39}])
    wanted, last = run_steps(TorchKernels(), layer, texts, [{0: 70, 1: 40}])
    for got, other, want in zip(outs, others, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * state_size**0.5)
        assert torch.equal(got, other)
    torch.testing.assert_close(states, last, rtol=1e-4, atol=1e-4)
    assert torch.equal(states, ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_in_bf16(any_kernels: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    layer = layer_of("mamba 2", head_dim=16)
    texts, steps = [text_of(layer, 30, dtype)], [{0: 12}, {0: 1}, {0: 17}]
    (got,), states = run_steps(any_kernels, layer, texts, steps, torch.bfloat16)
    assert states.dtype == torch.bfloat16
    (wanted,), last = run_steps(ReferenceKernels(), layer, texts, steps)
    torch.testing.assert_close(got, wanted, rtol=3e-2, atol=6e-2)
    torch.testing.assert_close(states.float(), last, rtol=3e-2, atol=6e-2)


def test_what_does_not_fit_is_refused() -> None:
    kernels, layer = native_or_skip(), layer_of("mamba 2")
    text, batch = text_of(layer, 3), batch_of([1, 2], [1, 2])
    states = torch.zeros(NUM_SLOTS, *layer.shape)
    good = {"slots": torch.tensor([0, 1]), "states": states, "text": text}
    for changed, error, message in (
        ({"slots": torch.tensor([0, NUM_SLOTS])}, IndexError, r"slots\[1\] is 5"),
        ({"states": states[:, :2]}, ValueError, "states"),
        ({"states": states.transpose(2, 3)}, ValueError, "states"),
        ({"text": replace(text, dt=None)}, ValueError, "time steps"),
        ({"text": replace(text, gate=text.b)}, ValueError, r"gate \[3, 12\]"),
        ({"text": replace(text, b=text.x)}, ValueError, r"b \[3, 32\]"),
        ({"text": text_of(layer, 4)}, ValueError, "query_start does not go from 0 up to the 4"),
    ):
        given = {**good, **changed}
        one = given["text"]
        with pytest.raises(error, match=message):
            kernels.selective_scan(
                one.x, one.b, one.c, one.dt, layer, given["states"], given["slots"], batch,
                gate=one.gate,
            )  # fmt: skip
    assert not states.any()
    for fields, message in (
        ({"num_groups": 3}, "3 groups"),
        ({"rates": torch.zeros(3)}, "rates"),
        ({"skip": torch.zeros(3)}, "skip"),
        ({"rates": layer.rates.double()}, "must be float32"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(layer, **fields)


@pytest.mark.parametrize("kind", KINDS)
def test_more_state_than_the_compiled_op_holds(kind: str) -> None:
    torch.manual_seed(5)
    layer = layer_of(kind, heads=2, head_dim=4, groups=1, state_size=300)
    texts = [text_of(layer, 5)]
    (got,), _ = run_steps(native_or_skip(), layer, texts, [{0: 5}])
    torch.testing.assert_close(got.double(), defined(layer, texts[0])[0], rtol=1e-4, atol=1e-3)
