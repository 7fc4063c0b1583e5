"""The gated delta rule: every implementation gives the plain recurrence, however a text is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.state_forms import DeltaForm, GatedNormForm
from sapwood.kernels.torch_ops import TorchKernels
from tests.kernels.test_convolution import batch_of

NUM_SLOTS = 5
LONG = 140


@dataclass(frozen=True)
class Text:
    """Inputs of one text's tokens, each [tokens, …]."""

    qkv: Tensor
    decay: Tensor
    write: Tensor


def make_form(
    heads: tuple[int, int] = (2, 4),
    dims: tuple[int, int] = (12, 20),
    *,
    per_channel: bool = False,
    write_scale: float = 1.0,
    lowest: float | None = None,
) -> DeltaForm:
    num_key_heads, num_heads = heads
    return DeltaForm(
        num_key_heads=num_key_heads, num_heads=num_heads, key_dim=dims[0], value_dim=dims[1],
        rate=torch.rand(num_heads) * 3,
        shift=torch.randn(num_heads * (dims[0] if per_channel else 1)),
        write_scale=write_scale,
        lowest=lowest,
    )  # fmt: skip


def make_text(form: DeltaForm, length: int, dtype: torch.dtype = torch.float32) -> Text:
    """Decays are sometimes near 0 and sometimes near 1."""
    sizes = (form.num_channels, form.shift.shape[0], form.num_heads)
    qkv, decay, write = (torch.randn(length, size) for size in sizes)
    return Text(qkv.to(dtype), (4 * decay - 2).to(dtype), write.to(dtype))


def run(
    kernels: Kernels,
    form: DeltaForm,
    texts: Sequence[Text],
    steps: Sequence[dict[int, int]],
    state_dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], Tensor]:
    """(outputs of each text, states of each): each step gives some texts a number of their next
    tokens. A slot's earlier owner left NaN, and the slots of other layers lie between."""
    shape = (NUM_SLOTS, 2, form.num_heads, form.key_dim, form.value_dim)
    states = torch.full(shape, torch.nan, dtype=state_dtype)[:, 1]
    slots = torch.tensor([3, 0, 4, 1])[: len(texts)]
    done, found = [0] * len(texts), [[] for _ in texts]  # type: ignore[var-annotated]
    for step in steps:
        order = sorted(step, key=lambda text: step[text] > 1)  # decodes first
        lens = [step[text] for text in order]
        parts = []
        for name in ("qkv", "decay", "write"):
            new = [getattr(texts[t], name)[done[t] : done[t] + step[t]] for t in order]
            parts.append(torch.cat(new))
        for text in order:
            done[text] += step[text]
        qkv, decay, write = parts
        # Columns of one projection, as a layer has them.
        joined = torch.cat((decay, write), dim=1)
        out = kernels.gated_delta_rule(
            qkv, joined[:, : decay.shape[1]], joined[:, decay.shape[1] :], form, states,
            slots[order], batch_of(lens, [done[text] for text in order]),
        )  # fmt: skip
        assert out.dtype == qkv.dtype
        for text, part in zip(order, out.split(lens), strict=True):
            found[text].append(part)
    assert states[[slot for slot in range(NUM_SLOTS) if slot not in slots]].isnan().all()
    return [torch.cat(parts) for parts in found], states[slots]


FORMS = {
    "heads": {},
    "channels": {"per_channel": True, "heads": (3, 3), "dims": (12, 12)},
    "wide": {"heads": (1, 2), "dims": (16, 144), "write_scale": 2.0},
    "whole vectors": {"heads": (1, 1), "dims": (8, 64), "per_channel": True},
    "bounded heads": {"lowest": -2.0},
    "bounded channels": {"per_channel": True, "heads": (2, 2), "dims": (12, 20), "lowest": -5.0},
}


@cache
def several_texts(form_name: str) -> tuple[DeltaForm, list[Text], list[Tensor], Tensor]:
    """(form, texts, their outputs, their states), by the reference, once for all kernels."""
    torch.manual_seed(0)
    form = make_form(**FORMS[form_name])  # type: ignore[arg-type]
    texts = [make_text(form, length) for length in (9, 23, 1)]
    return form, texts, *run(ReferenceKernels(), form, texts, [{0: 9, 1: 23, 2: 1}])


@cache
def long_text(*, per_channel: bool) -> tuple[DeltaForm, Text, Tensor, Tensor]:
    torch.manual_seed(1)
    form = make_form((1, 2), (8, 16), per_channel=per_channel)
    text = make_text(form, LONG)
    (want,), states = run(ReferenceKernels(), form, [text], [{0: LONG}])
    return form, text, want, states


@pytest.mark.parametrize("form_name", FORMS)
def test_prompts_decodes_and_chunks_together(any_kernels: Kernels, form_name: str) -> None:
    form, texts, want, expected = several_texts(form_name)
    steps = [{0: 6, 1: 4}, {0: 1, 1: 2}, {0: 1, 2: 1, 1: 17}, {0: 1}]
    got, states = run(any_kernels, form, texts, steps)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(states, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, LONG])
def test_chunks_equal_steps(any_kernels: Kernels, size: int, *, per_channel: bool) -> None:
    form, text, want, expected = long_text(per_channel=per_channel)
    steps = [{0: min(size, LONG - first)} for first in range(0, LONG, size)]
    (got,), states = run(any_kernels, form, [text], steps)
    torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-3)
    torch.testing.assert_close(states, expected, atol=5e-5, rtol=1e-3)


def test_bounded_decays_stay_within_their_bound(any_kernels: Kernels) -> None:
    """Of a state and a token that writes next to nothing, what is left lies between the two."""
    form = make_form((1, 1), (4, 4), per_channel=True, lowest=-1.5)
    states = torch.ones(1, 1, 4, 4)
    decay = torch.tensor([[-1e4, 1e4, 0.0, 50.0]])
    any_kernels.gated_delta_rule(
        torch.ones(1, 12), decay, torch.full((1, 1), -90.0), form, states, torch.tensor([0]),
        batch_of([1], [2]),
    )  # fmt: skip
    kept = states[0, 0, :, 0].log()
    wanted = -1.5 * torch.sigmoid(form.rate * (decay[0] + form.shift))
    torch.testing.assert_close(kept, wanted, atol=1e-4, rtol=1e-4)
    assert kept[0] == pytest.approx(0, abs=1e-5)
    assert kept[1] == pytest.approx(-1.5, abs=1e-4)


def test_a_bound_above_1_is_no_bound() -> None:
    with pytest.raises(ValueError, match=r"below 0, got 0\.5"):
        make_form(lowest=0.5)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_narrow_activations_and_states(any_kernels: Kernels, state_dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    form = make_form()
    texts = [make_text(form, 21, torch.bfloat16), make_text(form, 2, torch.bfloat16)]
    steps = [{0: 19, 1: 1}, {0: 1, 1: 1}, {0: 1}]
    want, expected = run(ReferenceKernels(), form, texts, steps, state_dtype)
    got, states = run(any_kernels, form, texts, steps, state_dtype)
    for one, other in zip([*got, states], [*want, expected], strict=True):
        torch.testing.assert_close(one, other, atol=2**-6, rtol=2**-6)


def test_extreme_decays_are_finite(any_kernels: Kernels) -> None:
    form = replace(make_form(), rate=torch.full((4,), 16.0))
    text = make_text(form, 40)
    text = replace(text, decay=torch.where(text.decay > 0, 90.0, -90.0))
    (want,), _ = run(ReferenceKernels(), form, [text], [{0: 40}])
    (got,), _ = run(any_kernels, form, [text], [{0: 30}, {0: 10}])
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("logistic", [True, False])
def test_gated_norms(
    any_kernels: Kernels, dtype: torch.dtype, *, norm_first: bool, logistic: bool
) -> None:
    torch.manual_seed(3)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    for group, width in ((5, 20), (64, 64), (33, 99)):
        x, both = torch.randn(7, width).to(dtype), torch.randn(7, 2 * width).to(dtype)
        weight = torch.randn(width).to(dtype)
        form = GatedNormForm(group=group, eps=1e-5, norm_first=norm_first, logistic=logistic)
        want = ReferenceKernels().gated_rms_norm(x, both[:, width:], weight, form)
        got = any_kernels.gated_rms_norm(x, both[:, width:], weight, form)
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_of_columns(any_kernels: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    x, both = torch.randn(3, 37).to(dtype), torch.randn(3, 80).to(dtype)
    want, got = x.clone(), x.clone()
    ReferenceKernels().gate_columns(want, both[:, 43:])
    any_kernels.gate_columns(got, both[:, 43:])
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_groups_must_fill_the_columns(any_kernels: Kernels) -> None:
    form = GatedNormForm(group=6, eps=1e-5)
    with pytest.raises(ValueError, match="20 columns are no groups of 6"):
        any_kernels.gated_rms_norm(torch.ones(1, 20), torch.ones(1, 20), torch.ones(20), form)
    with pytest.raises(ValueError, match="group must be >= 1"):
        GatedNormForm(group=0, eps=1e-5)


def test_a_form_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple of 3 key heads"):
        make_form((3, 4))
    with pytest.raises(ValueError, match="impossible heads"):
        make_form((0, 4))
    with pytest.raises(ValueError, match=r"rate must be \[4\]"):
        replace(make_form(), rate=torch.ones(3))
    with pytest.raises(ValueError, match="shift"):
        replace(make_form(), shift=torch.ones(3))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"slots": torch.tensor([0, 5])}, IndexError, r"slots\[1\] is 5"),
        ({"qkv": torch.ones(3, 5)}, ValueError, r"qkv \[3, 5\]"),
        ({"decay": torch.ones(2, 4)}, ValueError, r"decay \[2, 4\]"),
        ({"write": torch.ones(3, 4).bfloat16()}, ValueError, "write"),
        ({"states": torch.zeros(5, 4, 20, 12)}, ValueError, "states"),
        ({"states": torch.zeros(5, 4, 12, 20).half()}, ValueError, "float32 or bfloat16"),
        ({"states": torch.zeros(5, 4, 20, 12).mT}, ValueError, "each slot contiguous"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    changed: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    if not CpuKernels.usable_isas():
        pytest.skip("this build has no C++ kernels")
    form = make_form()
    text = make_text(form, 3)
    arguments = {
        "qkv": text.qkv, "decay": text.decay, "write": text.write,
        "states": torch.zeros(5, 4, 12, 20), "slots": torch.tensor([0, 1]), **changed,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        CpuKernels().gated_delta_rule(**arguments, form=form, batch=batch_of([1, 2], [1, 2]))
    assert not arguments["states"].any()


def test_a_begin_of_the_same_text_leaves_the_same_state() -> None:
    """What a kept state is for: going on from a copy of it equals going on."""
    torch.manual_seed(4)
    form = make_form()
    text = make_text(form, 30)
    (want,), _ = run(ReferenceKernels(), form, [text], [{0: 30}])
    for cut in (1, 8, 16, 29):
        states = torch.zeros(2, 4, 12, 20)
        kernels, parts = TorchKernels(), []
        for begin, end, slot in ((0, cut, 0), (cut, 30, 1)):
            if slot:
                states[1] = states[0]
            own = slice(begin, end)
            parts.append(
                kernels.gated_delta_rule(
                    text.qkv[own], text.decay[own], text.write[own], form, states,
                    torch.tensor([slot]), batch_of([end - begin], [end]),
                )
            )  # fmt: skip
        torch.testing.assert_close(torch.cat(parts), want, atol=2e-5, rtol=1e-4)
