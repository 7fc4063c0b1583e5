"""Drawing tokens without a sort.

Every filter keeps a prefix of a row's tokens, likeliest first and equally likely ones in the order
of their ids, and the number drawn is a place in that prefix. So a draw needs only the weight (or
the count) of all tokens that are at least as likely as some bound, and the bound at which this
weight (or count) reaches a wanted value:

1. For a few fixed bounds below the largest logit, each program measures its split of a row.
2. From these measures follows a bracket of bounds between which the filters cut, or, without
   filters, between which the drawn token lies. Each program lists its split's tokens in there, in
   the order of their ids. Mostly that is a few hundred of 150,000.
3. One program per row searches the list. The bits of positive fp32 numbers order them as the
   numbers do, so a bound is found digit by digit, five bits of the weight at a time.

A token's weight is exp((logit - largest) / temperature), in fp32; sums of the weights of blocks are
fp64. The draw is the reference's (which computes in fp64), unless a filter or the drawn number
falls within 1e-5 of a boundary between two tokens. Logits that differ by less than fp32 resolves
after exp count as equal. A row's token depends on that row alone.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from sapwood.kernels.sampling_settings import SamplingSettings
from sapwood.kernels.transfer import upload_one

_SPLIT = 4096
"""Logits of one row that one program measures."""
_BOUNDS = 16
_STEP = 0.75
"""Distance of two bounds, in natural logarithms of the weight; the last bound is below all."""
_MEASURE_BLOCK = 512
_SEARCH_BLOCK = 256


@triton.jit
def _row_settings(settings_ptr, row, num_rows):
    """settings [5, rows] fp64 -> 1 / temperature (fp32), top_k, top_p, min_p, number"""
    setting = settings_ptr + row
    inverse = (1.0 / tl.load(setting)).to(tl.float32)
    top_k = tl.load(setting + num_rows).to(tl.int32)
    top_p = tl.load(setting + 2 * num_rows)
    min_p = tl.load(setting + 3 * num_rows)
    return inverse, top_k, top_p, min_p, tl.load(setting + 4 * num_rows)


@triton.jit
def _lower_bounds(place, STEP: tl.constexpr, BOUNDS: tl.constexpr):
    """place -> the logarithm of a weight; forbidden tokens, at minus infinity, are below all."""
    return tl.where(place == BOUNDS - 1, -3.0e38, -STEP * (place + 1).to(tl.float32))


@triton.jit
def _measure(
    logits_ptr,
    largest_ptr,
    settings_ptr,
    weight_ptr,
    count_ptr,
    vocab,
    stride,
    num_splits,
    SPLIT: tl.constexpr,
    STEP: tl.constexpr,
    BOUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weight and count [rows, splits, BOUNDS] of the tokens at or above each bound."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    inverse = (1.0 / tl.load(settings_ptr + row)).to(tl.float32)
    largest = tl.load(largest_ptr + row).to(tl.float32)
    place = tl.arange(0, BOUNDS)
    bounds = _lower_bounds(place, STEP, BOUNDS)
    weight = tl.zeros((BOUNDS,), tl.float32)
    count = tl.zeros((BOUNDS,), tl.int32)
    end = tl.minimum(SPLIT, vocab - split * SPLIT)
    for start in range(0, end, BLOCK):
        token = split * SPLIT + start + tl.arange(0, BLOCK)
        logit = tl.load(
            logits_ptr + row * stride + token, mask=token < vocab, other=-float("inf")
        ).to(tl.float32)
        distance = (logit - largest) * inverse
        above = distance[None, :] >= bounds[:, None]
        weight += tl.sum(tl.where(above, tl.exp(distance)[None, :], 0.0), axis=1)
        count += tl.sum(above.to(tl.int32), axis=1)
    at = (row * num_splits + split) * BOUNDS + place
    tl.store(weight_ptr + at, weight)
    tl.store(count_ptr + at, count)


@triton.jit
def _first(is_so, place, BOUNDS: tl.constexpr):
    """The first place where `is_so` holds, or the last place if it holds nowhere."""
    return tl.min(tl.where(is_so, place, BOUNDS - 1), axis=0)


@triton.jit
def _bracket(weight, count, place, bounds, top_k, top_p, min_p, number, BOUNDS: tl.constexpr):
    """weight fp64 and count [BOUNDS] of a whole row -> (low, high): what must be listed is at or
    above bound `low` and, if high >= 0, below bound `high`."""
    total = tl.max(weight, axis=0)
    low = tl.full((), BOUNDS - 1, tl.int32)
    high = tl.full((), -1, tl.int32)
    cuts_k = (top_k > 0) & (top_k < tl.max(count, axis=0))
    if cuts_k | (top_p < 1.0) | (min_p > 0.0):
        if cuts_k:
            low = _first(count >= top_k, place, BOUNDS)
        elif top_p < 1.0:
            # A little more than is needed, because the search will sum in another order.
            low = _first(weight >= top_p * total * (1 + 1e-5), place, BOUNDS)
        if min_p > 0.0:
            floor = tl.log(min_p.to(tl.float32)) - 1e-3
            low = tl.minimum(low, _first(bounds < floor, place, BOUNDS))
    else:
        low = _first(weight > number * total, place, BOUNDS)
        high = low - 1
    return low, high


@triton.jit(do_not_specialize=["num_rows"])
def _list_bracket(
    logits_ptr,
    largest_ptr,
    settings_ptr,
    weight_ptr,
    count_ptr,
    listed_ptr,
    size_ptr,
    sums_ptr,
    num_rows,
    vocab,
    stride,
    num_splits,
    SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    STEP: tl.constexpr,
    BOUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """listed [rows, vocab]: the ids in the bracket; size [rows]: how many; sums [rows, 2]: the
    weight of all that is above the bracket, and of the whole row"""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    inverse, top_k, top_p, min_p, number = _row_settings(settings_ptr, row, num_rows)
    largest = tl.load(largest_ptr + row).to(tl.float32)
    place = tl.arange(0, BOUNDS)
    bounds = _lower_bounds(place, STEP, BOUNDS)
    splits = tl.arange(0, SPLITS)
    at = (row * num_splits + splits[:, None]) * BOUNDS + place[None, :]
    is_split = splits[:, None] < num_splits
    weights = tl.load(weight_ptr + at, mask=is_split, other=0.0).to(tl.float64)
    counts = tl.load(count_ptr + at, mask=is_split, other=0)
    weight = tl.sum(weights, axis=0)
    count = tl.sum(counts, axis=0)
    low, high = _bracket(weight, count, place, bounds, top_k, top_p, min_p, number, BOUNDS)

    listed = (place == low).to(tl.int32) - (place == high).to(tl.int32)
    per_split = tl.sum(counts * listed[None, :], axis=1)
    begin = tl.sum(tl.where(splits < split, per_split, 0), axis=0)
    if split == 0:
        tl.store(size_ptr + row, tl.sum(per_split, axis=0))
        tl.store(sums_ptr + 2 * row, tl.sum(tl.where(place == high, weight, 0.0), axis=0))
        tl.store(sums_ptr + 2 * row + 1, tl.max(weight, axis=0))
    floor = tl.sum(tl.where(place == low, bounds, 0.0), axis=0)
    ceiling = tl.min(tl.where(place == high, bounds, float("inf")), axis=0)
    end = tl.minimum(SPLIT, vocab - split * SPLIT)
    for start in range(0, end, BLOCK):
        token = split * SPLIT + start + tl.arange(0, BLOCK)
        logit = tl.load(
            logits_ptr + row * stride + token, mask=token < vocab, other=-float("inf")
        ).to(tl.float32)
        distance = (logit - largest) * inverse
        inside = (distance >= floor) & (distance < ceiling)
        to = begin + tl.cumsum(inside.to(tl.int32), axis=0) - 1
        tl.store(listed_ptr + row * vocab + to, token, mask=inside)
        begin += tl.sum(inside.to(tl.int32), axis=0)


@triton.jit
def _weights_of(logits_ptr, listed_ptr, start, size, largest, inverse, BLOCK: tl.constexpr):
    """Ids of a block of the list, their weights, and the weights' bits; -1 beyond the list."""
    place = start + tl.arange(0, BLOCK)
    inside = place < size
    token = tl.load(listed_ptr + place, mask=inside, other=0)
    logit = tl.load(logits_ptr + token, mask=inside, other=-float("inf")).to(tl.float32)
    weight = tl.exp((logit - largest) * inverse)
    return token, weight, tl.where(inside, weight.to(tl.int32, bitcast=True), -1)


@triton.jit
def _search(
    logits_ptr,
    listed_ptr,
    size,
    largest,
    inverse,
    wanted,
    COUNTS: tl.constexpr,
    STRICT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest bits such that the list's weight (or count) at or above them is at least
    `wanted`; STRICT: above it. A weight is at most 1, so its bits are below 1 << 30."""
    digit = tl.arange(0, 32)
    bits = tl.zeros((), tl.int32)
    for level in range(6):
        shift = 25 - 5 * level
        trial = bits + (digit << shift)
        reached = tl.zeros((32,), tl.float64)
        for start in range(0, size, BLOCK):
            _tokens, weight, keys = _weights_of(
                logits_ptr, listed_ptr, start, size, largest, inverse, BLOCK
            )
            at = keys[None, :] >= trial[:, None]
            if COUNTS:
                reached += tl.sum(at.to(tl.int32), axis=1).to(tl.float64)
            else:
                reached += tl.sum(tl.where(at, weight[None, :], 0.0), axis=1).to(tl.float64)
        enough = reached > wanted if STRICT else reached >= wanted
        chosen = tl.maximum(tl.sum(enough.to(tl.int32), axis=0) - 1, 0)
        bits += chosen << shift
    return bits


@triton.jit
def _around(logits_ptr, listed_ptr, size, largest, inverse, bits, BLOCK: tl.constexpr):
    """Of the list: the weight of what is above the bits and the count of it, and how many have just
    these bits."""
    weight_above = tl.zeros((), tl.float64)
    count_above = tl.zeros((), tl.int32)
    equal = tl.zeros((), tl.int32)
    for start in range(0, size, BLOCK):
        _tokens, weight, keys = _weights_of(
            logits_ptr, listed_ptr, start, size, largest, inverse, BLOCK
        )
        weight_above += tl.sum(tl.where(keys > bits, weight, 0.0), axis=0).to(tl.float64)
        count_above += tl.sum((keys > bits).to(tl.int32), axis=0)
        equal += tl.sum((keys == bits).to(tl.int32), axis=0)
    return weight_above, count_above, equal


@triton.jit(do_not_specialize=["num_rows"])
def _choose(
    logits_ptr,
    largest_ptr,
    settings_ptr,
    listed_ptr,
    size_ptr,
    sums_ptr,
    out_ptr,
    num_rows,
    vocab,
    stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inverse, top_k, top_p, min_p, number = _row_settings(settings_ptr, row, num_rows)
    largest = tl.load(largest_ptr + row).to(tl.float32)
    size = tl.load(size_ptr + row)
    before = tl.load(sums_ptr + 2 * row)
    kept = tl.load(sums_ptr + 2 * row + 1)
    logits_ptr += row * stride
    listed_ptr += row * vocab

    least = tl.full((), 0x7FFFFFFF, tl.int32)
    for start in range(0, size, BLOCK):
        _tokens, _unused, keys = _weights_of(
            logits_ptr, listed_ptr, start, size, largest, inverse, BLOCK
        )
        least = tl.minimum(least, tl.min(tl.where(keys < 0, 0x7FFFFFFF, keys), axis=0))

    if (top_k > 0) & (top_k < size):
        wanted = top_k.to(tl.float64)
        bits = _search(logits_ptr, listed_ptr, size, largest, inverse, wanted, True, False, BLOCK)
        above, count, _equal = _around(logits_ptr, listed_ptr, size, largest, inverse, bits, BLOCK)
        weight = bits.to(tl.float32, bitcast=True).to(tl.float64)
        kept = above + (top_k - count).to(tl.float64) * weight
    if top_p < 1.0:
        wanted = top_p * kept
        bits = _search(logits_ptr, listed_ptr, size, largest, inverse, wanted, False, False, BLOCK)
        bits = tl.maximum(bits, least)
        above, _count, equal = _around(logits_ptr, listed_ptr, size, largest, inverse, bits, BLOCK)
        weight = bits.to(tl.float32, bitcast=True).to(tl.float64)
        needed = tl.ceil(tl.where(weight > 0, (wanted - above) / weight, 1.0))
        needed = tl.minimum(tl.maximum(needed, 1.0), equal.to(tl.float64))
        kept = tl.minimum(kept, above + needed * weight)
    if min_p > 0.0:
        likely = tl.zeros((), tl.float64)
        for start in range(0, size, BLOCK):
            _tokens, weights, keys = _weights_of(
                logits_ptr, listed_ptr, start, size, largest, inverse, BLOCK
            )
            is_likely = (keys >= 0) & (weights >= min_p.to(tl.float32))
            likely += tl.sum(tl.where(is_likely, weights, 0.0), axis=0).to(tl.float64)
        kept = tl.minimum(kept, likely)

    wanted = number * kept - before
    bits = _search(logits_ptr, listed_ptr, size, largest, inverse, wanted, False, True, BLOCK)
    bits = tl.maximum(bits, least)
    above, _count, equal = _around(logits_ptr, listed_ptr, size, largest, inverse, bits, BLOCK)
    weight = bits.to(tl.float32, bitcast=True).to(tl.float64)
    steps = tl.where(weight > 0, (wanted - above) / weight, 0.0)
    steps = tl.minimum(tl.maximum(steps, 0.0), tl.maximum(equal - 1, 0).to(tl.float64))
    rank = steps.to(tl.int32)
    seen = tl.zeros((), tl.int32)
    chosen = tl.zeros((), tl.int32)
    for start in range(0, size, BLOCK):
        token, _unused, keys = _weights_of(
            logits_ptr, listed_ptr, start, size, largest, inverse, BLOCK
        )
        equals = (keys == bits).to(tl.int32)
        is_it = (equals == 1) & (seen + tl.cumsum(equals, axis=0) - 1 == rank)
        chosen += tl.sum(tl.where(is_it, token, 0), axis=0)
        seen += tl.sum(equals, axis=0)
    tl.store(out_ptr + row, chosen.to(tl.int64))


def sample(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """As Kernels.sample; a row of NaN gets token 0. The filters' settings go to the device in one
    copy that nobody waits for."""
    if not len(settings):
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    return sample_with(logits, upload_one(settings.table(), np.float64, logits.device))


def sample_with(logits: Tensor, settings: Tensor) -> Tensor:
    """The same with the settings on the device, so that it can be captured in a graph.

    logits    [S, vocab]
    settings  [5, S] fp64, as from `SamplingSettings.table`
    Returns   [S] int64
    """
    rows, vocab = logits.shape
    device = logits.device
    num_splits = triton.cdiv(vocab, _SPLIT)
    largest = logits.amax(dim=-1)
    measured = (rows, num_splits, _BOUNDS)
    weight = torch.empty(measured, dtype=torch.float32, device=device)
    count = torch.empty(measured, dtype=torch.int32, device=device)
    listed = torch.empty((rows, vocab), dtype=torch.int32, device=device)
    size = torch.empty(rows, dtype=torch.int32, device=device)
    sums = torch.empty((rows, 2), dtype=torch.float64, device=device)
    out = torch.empty(rows, dtype=torch.int64, device=device)
    stride = logits.stride(0)
    shape = {"SPLIT": _SPLIT, "STEP": _STEP, "BOUNDS": _BOUNDS, "BLOCK": _MEASURE_BLOCK}
    _measure[(rows, num_splits)](
        logits, largest, settings, weight, count, vocab, stride, num_splits, **shape
    )
    _list_bracket[(rows, num_splits)](
        logits, largest, settings, weight, count, listed, size, sums, rows, vocab, stride,
        num_splits, SPLITS=triton.next_power_of_2(num_splits), **shape,
    )  # fmt: skip
    _choose[(rows,)](
        logits, largest, settings, listed, size, sums, out, rows, vocab, stride,
        BLOCK=_SEARCH_BLOCK, num_warps=8,
    )  # fmt: skip
    return out
