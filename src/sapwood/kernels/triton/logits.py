"""The largest logit, forbidden tokens and penalties. argmax and masks are exact."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.transfer import upload

_BLOCK = 1024
_SPLIT = 4096
"""Logits of a row that one program looks at; many programs share even a single row."""


@triton.jit
def _largest_of_split(
    logits_ptr, value_ptr, index_ptr, vocab, stride, num_splits, SPLIT: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    token = split * SPLIT + tl.arange(0, SPLIT)
    inside = token < vocab
    logits = tl.load(logits_ptr + row * stride + token, mask=inside, other=-float("inf"))
    logits = logits.to(tl.float32)
    largest = tl.max(logits, axis=0)
    first = tl.min(tl.where(inside & (logits == largest), token, vocab), axis=0)
    tl.store(value_ptr + row * num_splits + split, largest)
    tl.store(index_ptr + row * num_splits + split, first)


@triton.jit
def _largest_of_splits(value_ptr, index_ptr, out_ptr, vocab, num_splits, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    inside = split < num_splits
    at = row * num_splits + split
    values = tl.load(value_ptr + at, mask=inside, other=-float("inf"))
    tokens = tl.load(index_ptr + at, mask=inside, other=vocab)
    largest = tl.max(values, axis=0)
    first = tl.min(tl.where(values == largest, tokens, vocab), axis=0)
    # A row of NaN has no largest entry, and gets some token.
    tl.store(out_ptr + row, tl.minimum(first, vocab - 1).to(tl.int64))


@triton.jit
def _mask_logits(logits_ptr, masks_ptr, rows_ptr, vocab, stride, words, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    row = tl.load(rows_ptr + place).to(tl.int64)
    word = tl.load(masks_ptr + place * words + token // 32, mask=inside, other=-1)
    forbidden = ((word >> (token % 32)) & 1) == 0
    nothing = tl.full((BLOCK,), -float("inf"), logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + row * stride + token, nothing, mask=inside & forbidden)


@triton.jit(do_not_specialize=["size"])  # it changes with each token
def _penalise(
    logits_ptr, ids_ptr, counts_ptr, size, repetition, frequency, presence, BLOCK: tl.constexpr
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    tokens = logits_ptr + tl.load(ids_ptr + place, mask=inside, other=0)
    count = tl.load(counts_ptr + place, mask=inside, other=0.0)
    logits = tl.load(tokens, mask=inside, other=0.0).to(tl.float32)
    logits = tl.where(logits > 0, logits / repetition, logits * repetition)
    logits -= frequency * count + tl.where(count > 0, presence, 0.0)
    tl.store(tokens, logits.to(logits_ptr.dtype.element_ty), mask=inside)


def argmax(logits: Tensor) -> Tensor:
    """As Kernels.argmax."""
    rows, vocab = logits.shape
    num_splits = triton.cdiv(vocab, _SPLIT)
    values = torch.empty((rows, num_splits), dtype=torch.float32, device=logits.device)
    indices = torch.empty((rows, num_splits), dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _largest_of_split[(rows, num_splits)](
        logits, values, indices, vocab, logits.stride(0), num_splits, SPLIT=_SPLIT, num_warps=8
    )
    _largest_of_splits[(rows,)](
        values, indices, out, vocab, num_splits, SPLITS=triton.next_power_of_2(num_splits)
    )
    return out


def mask_logits(logits: Tensor, masks: Tensor, rows: Sequence[int]) -> None:
    """As Kernels.mask_logits. Masks and rows go to the device in one copy that nobody waits for."""
    num, words = masks.shape
    at, on_device = upload([np.asarray(rows, dtype=np.int32), masks.numpy()], logits.device)
    vocab = logits.shape[1]
    _mask_logits[(num, triton.cdiv(vocab, _BLOCK))](
        logits, on_device, at, vocab, logits.stride(0), words, BLOCK=_BLOCK
    )


def penalise(
    logits: Tensor,
    ids: Tensor,
    counts: Tensor,
    *,
    repetition: float,
    frequency: float,
    presence: float,
) -> None:
    """As Kernels.penalise."""
    size = ids.shape[0]
    _penalise[(triton.cdiv(size, _BLOCK),)](
        logits, ids, counts, size, float(repetition), float(frequency), float(presence),
        BLOCK=_BLOCK,
    )  # fmt: skip
