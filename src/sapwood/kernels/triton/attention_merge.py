"""The parts of each row, attended to by different programs, become one by log-sum-exp.

With part i's result o_i and l_i = log2(sum of 2^score over its keys), the whole is
sum(2^l_i o_i) / sum(2^l_i). An attention sink is one more term below.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from sapwood.kernels.triton.attention_core import LOG2E, finish


@triton.jit(do_not_specialize=["num_parts"])
def merge_kernel(
    parts, part_lse, sinks, out, num_heads, num_parts,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, Hq); shapes as in `attention_core.store`. BLOCK_P parts are read at once."""
    token, head = tl.program_id(0), tl.program_id(1)
    entry = tl.arange(0, BLOCK_D)
    in_head = entry < HEAD_DIM
    row = token.to(tl.int64) * num_heads + head
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    weighted = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, num_parts, BLOCK_P):
        part = begin + tl.arange(0, BLOCK_P)
        slot = row * num_parts + part
        lse = tl.load(part_lse + slot, mask=part < num_parts, other=float("-inf"))
        # A part that saw no key was not written: it must not be read either.
        mask = (lse > float("-inf"))[:, None] & in_head[None, :]
        values = tl.load(parts + (slot * HEAD_DIM)[:, None] + entry[None, :], mask=mask, other=0.0)
        higher = tl.maximum(highest, tl.max(lse, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(lse - base)
        rescale = tl.exp2(highest - base)
        total = total * rescale + tl.sum(weight, 0)
        weighted = weighted * rescale + tl.sum(weight[:, None] * values, 0)
        highest = higher
    sink = highest
    if sinks is not None:
        sink = tl.load(sinks + head) * LOG2E
    factor, divisor = finish(highest, total, sink, sinks is not None)
    result = weighted * (factor / divisor)
    tl.store(out + row * HEAD_DIM + entry, result.to(out.dtype.element_ty), mask=in_head)
