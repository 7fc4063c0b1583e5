"""A whole decoder step in one call against the same ops one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.attention_batch import PLAIN, AttentionBatch
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.kv_cache import LARGEST_NUMBER, kv_cache_shape
from sapwood.kernels.recording import (
    Activate,
    Add,
    Attend,
    CannotRecord,
    Embed,
    Join,
    Logits,
    Multiply,
    Norm,
    Op,
    Program,
    ResizeHeads,
    RotateAndWrite,
)
from sapwood.kernels.recording_buffers import Buffer
from sapwood.kernels.reference import ReferenceKernels

pytest.importorskip(
    "sapwood.kernels.cpu._native", reason="the native kernels are not built", exc_type=ImportError
)
from sapwood.kernels.cpu.step import NativeStep

HIDDEN, INNER, VOCAB, NUM_LAYERS = 96, 160, 77, 3
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES = 6, 2, 32, 16, 12
EPS, SCALE = 1e-5, HEAD_DIM**-0.5


@dataclass(frozen=True)
class Weights:
    """Plain tensors, from which both sides are built."""

    embedding: Tensor
    norms: list[tuple[Tensor, Tensor]]
    head_norms: list[tuple[Tensor, Tensor] | None]
    linears: list[list[tuple[Tensor, Tensor | None]]]
    cos_sin: Tensor


def make_weights(dtype: torch.dtype, *, variant: bool) -> Weights:
    """variant: with biases on q, k, v and norms over heads."""
    torch.manual_seed(3)
    qkv = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    sizes = [(qkv, HIDDEN), (HIDDEN, NUM_HEADS * HEAD_DIM), (2 * INNER, HIDDEN), (HIDDEN, INNER)]
    angle = torch.rand(64, HEAD_DIM // 2) * 6

    def norm(size: int) -> Tensor:
        return (torch.rand(size) + 0.5).to(dtype)

    return Weights(
        embedding=torch.randn(VOCAB, HIDDEN).to(dtype),
        norms=[(norm(HIDDEN), norm(HIDDEN)) for _ in range(NUM_LAYERS)] + [(norm(HIDDEN),) * 2],
        head_norms=[(norm(HEAD_DIM), norm(HEAD_DIM)) if variant else None] * NUM_LAYERS,
        linears=[
            [
                (
                    (torch.randn(n, k) * k**-0.5).to(dtype),
                    torch.randn(n).to(dtype) if variant and i == 0 else None,
                )
                for i, (n, k) in enumerate(sizes)
            ]
            for _ in range(NUM_LAYERS)
        ],
        cos_sin=torch.cat((angle.cos(), angle.sin()), dim=1),
    )


def make_caches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    shape = kv_cache_shape(NUM_PAGES, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM, dtype)
    return [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(3)]


def make_step(
    kernels: CpuKernels,
    weights: Weights,
    caches: list[tuple[Tensor, Tensor]],
    group_of_layer: tuple[int, ...] = (),
) -> NativeStep:
    dtype = weights.norms[-1][0].dtype
    program = Program(dtype)

    def norm(x: Buffer, residual: Buffer | None, weight: Tensor) -> Buffer:
        out = program.buffer(HIDDEN)
        program.add(
            Norm(x=x, residual=residual, weight=weight, bias=None, centered=False, eps=EPS, out=out)
        )
        return out

    def multiply(x: Buffer, pair: tuple[Tensor, Tensor | None]) -> Buffer:
        out = program.buffer(pair[0].shape[0])
        program.add(Multiply(x=x, layer=kernels.pack_linear(*pair, dtype), out=out))
        return out

    heads = {"num_heads": NUM_HEADS, "num_kv_heads": NUM_KV_HEADS, "head_dim": HEAD_DIM}
    residual = program.buffer(HIDDEN)
    program.add(Embed(weight=weights.embedding, scale=1.0, out=residual))
    normed = norm(residual, None, weights.norms[0][0])
    for layer, (qkv, o, gate_up, down) in enumerate(weights.linears):
        q_norm, k_norm = weights.head_norms[layer] or (None, None)
        q, attended, gated = (
            program.buffer(width) for width in (*[NUM_HEADS * HEAD_DIM] * 2, INNER)
        )
        program.add(
            RotateAndWrite(
                x=multiply(normed, qkv), layer=layer, q_norm=q_norm, k_norm=k_norm, eps=EPS,
                cos_sin=weights.cos_sin, out=q, **heads,
            )
        )  # fmt: skip
        program.add(Attend(x=q, layer=layer, scale=SCALE, traits=PLAIN, out=attended, **heads))
        normed = norm(multiply(attended, o), residual, weights.norms[layer][1])
        up = multiply(normed, gate_up)
        program.add(Activate(x=up, activation=Activation.SILU, gated=True, out=gated))
        normed = norm(multiply(gated, down), residual, weights.norms[layer + 1][0])
    head = kernels.pack_linear(weights.embedding, None, dtype)
    program.add(Logits(x=normed, layer=head, vocab_size=VOCAB, scale=1.0, soft_cap=None))
    return NativeStep(kernels, program, caches, group_of_layer)


def call(
    step: NativeStep,
    token_ids: Tensor,
    positions: Tensor,
    write_index: Tensor,
    batch: AttentionBatch,
    logits_index: Tensor,
) -> Tensor:
    return step(token_ids, positions, [write_index], [batch], logits_index)


def run_ops(
    kernels: Kernels,
    weights: Weights,
    caches: list[tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, Tensor, Tensor, AttentionBatch, Tensor],
) -> Tensor:
    """The step, op by op."""
    token_ids, positions, write_index, batch, logits_index = inputs
    dtype = weights.norms[0][0].dtype
    residual = kernels.embedding(token_ids, weights.embedding, dtype)
    normed = kernels.rms_norm(residual, weights.norms[0][0], EPS)
    for i, (keys, values) in enumerate(caches):
        qkv, o, gate_up, down = (kernels.pack_linear(*pair, dtype) for pair in weights.linears[i])
        q_norm, k_norm = weights.head_norms[i] or (None, None)
        q = kernels.qk_norm_rope_write_kv(
            qkv(normed), num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM,
            q_norm=q_norm, k_norm=k_norm, eps=EPS, cos_sin=weights.cos_sin, positions=positions,
            key_cache=keys, value_cache=values, write_index=write_index,
        )  # fmt: skip
        x = o(kernels.paged_attention(q, keys, values, batch, SCALE).flatten(1))
        normed, residual = kernels.add_rms_norm(x, residual, weights.norms[i][1], EPS)
        x = down(kernels.activate_and_mul(gate_up(normed), Activation.SILU))
        normed, residual = kernels.add_rms_norm(x, residual, weights.norms[i + 1][0], EPS)
    return kernels.pack_linear(weights.embedding, None, dtype).fp32(normed[logits_index])


def make_inputs(
    query_lens: list[int], context_lens: list[int]
) -> tuple[Tensor, Tensor, Tensor, AttentionBatch, Tensor]:
    page_table = torch.arange(1, 1 + 3 * len(query_lens), dtype=torch.int32).view(-1, 3)
    positions = torch.cat(
        [torch.arange(c - n, c) for n, c in zip(query_lens, context_lens, strict=True)]
    )
    requests = torch.arange(len(query_lens)).repeat_interleave(torch.tensor(query_lens))
    pages = page_table[requests, positions // PAGE_SIZE].long()
    ends = list(itertools.accumulate(query_lens))
    batch = AttentionBatch(
        page_table=page_table,
        query_start=torch.tensor([0, *ends], dtype=torch.int32),
        context_len=torch.tensor(context_lens, dtype=torch.int32),
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
        num_decodes=0,
    )
    token_ids = torch.randint(0, VOCAB, (len(positions),))
    write_index = pages * PAGE_SIZE + positions % PAGE_SIZE
    return token_ids, positions, write_index, batch, torch.tensor(ends) - 1


@pytest.mark.parametrize("variant", [False, True], ids=["llama", "biases-and-head-norms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kv", [None, *LARGEST_NUMBER], ids=["dense", "int8", "e4m3", "e5m2"])
def test_prefill_then_decode(dtype: torch.dtype, variant: bool, kv: torch.dtype | None) -> None:
    weights = make_weights(dtype, variant=variant)
    kernels = CpuKernels(num_threads=2)
    one_call, ops, reference = (make_caches(kv or dtype) for _ in range(3))
    step = make_step(kernels, weights, one_call)
    for query_lens, context_lens in (([20, 3], [20, 3]), ([5, 1], [25, 4]), ([1, 1], [26, 5])):
        inputs = make_inputs(query_lens, context_lens)
        logits = call(step, *inputs)
        assert torch.equal(logits, run_ops(kernels, weights, ops, inputs))
        for pair, other in zip(one_call, ops, strict=True):
            for side in range(2):
                assert torch.equal(pair[side].view(torch.uint8), other[side].view(torch.uint8))
        expected = run_ops(ReferenceKernels(), weights, reference, inputs)
        # In fp32, that a number of an 8-bit cache was rounded to its other neighbour.
        tolerance = (1e-4 if kv is None else 0.02) if dtype == torch.float32 else 0.04
        error = (logits.float() - expected.float()).abs().max()
        assert error <= tolerance * expected.float().abs().max()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_weights_of_16_bits_compute_what_their_float32_copies_do(stored: torch.dtype) -> None:
    kernels = CpuKernels(num_threads=2)
    wide = make_weights(torch.float32, variant=True)
    for linears in wide.linears:
        linears[:] = [(weight.to(stored).float(), bias) for weight, bias in linears]
    narrow = replace(
        wide,
        embedding=wide.embedding.to(stored),
        linears=[[(weight.to(stored), bias) for weight, bias in one] for one in wide.linears],
    )
    wide = replace(wide, embedding=narrow.embedding.float())
    steps = [make_step(kernels, one, make_caches(torch.float32)) for one in (narrow, wide)]
    for query_lens, context_lens in (([20, 3], [20, 3]), ([1, 1], [21, 4])):
        inputs = make_inputs(query_lens, context_lens)
        assert torch.equal(call(steps[0], *inputs), call(steps[1], *inputs))


def test_only_wanted_rows_have_logits() -> None:
    weights = make_weights(torch.float32, variant=False)
    step = make_step(CpuKernels(num_threads=1), weights, make_caches(torch.float32))
    inputs = make_inputs([4, 2], [4, 2])
    both = call(step, *inputs).clone()  # the next step overwrites them
    assert torch.equal(call(step, *inputs[:4], torch.tensor([5, 3])), both.flip(0))
    assert call(step, *inputs[:4], torch.tensor([], dtype=torch.int64)).shape == (0, VOCAB)


@pytest.mark.parametrize(
    ("which", "name", "limit"),
    [
        (0, "token_ids", VOCAB),
        (1, "positions", 64),
        (2, "write_index", 192),
        (4, "logits_index", 4),
    ],
)
def test_an_index_outside_is_refused_and_nothing_written(which: int, name: str, limit: int) -> None:
    caches = make_caches(torch.float32)
    step = make_step(CpuKernels(), make_weights(torch.float32, variant=False), caches)
    inputs = make_inputs([4], [4])
    inputs[which][0] = limit
    with pytest.raises(IndexError, match=rf"{name}\[0\] is {limit} but must be in \[0, {limit}\)"):
        call(step, *inputs)
    assert not any(cache.any() for pair in caches for cache in pair)


def test_parts_that_do_not_fit_are_refused() -> None:
    kernels = CpuKernels()
    weights = make_weights(torch.float32, variant=False)
    with pytest.raises(ValueError, match="2 KV caches, but the model has a layer 2"):
        make_step(kernels, weights, make_caches(torch.float32)[:2])
    with pytest.raises(ValueError, match="KV cache"):
        make_step(kernels, weights, make_caches(torch.bfloat16))
    weights.linears[1][1] = (torch.randn(HIDDEN + 1, NUM_HEADS * HEAD_DIM), None)
    with pytest.raises(ValueError, match=r"norm's weight \[96\] float32 must be \[97\]"):
        make_step(kernels, weights, make_caches(torch.float32))


def program_of(op: Op, out: Buffer, program: Program, x: Buffer, weight: Tensor) -> Program:
    """The embedding x, one op, and logits of what it gives."""
    layer = CpuKernels().pack_linear(weight, None)
    program.add(Embed(weight=torch.arange(8.0 * VOCAB).view(VOCAB, 8), scale=1.0, out=x))
    program.add(op)
    program.keep_states(x, None)
    program.add(Logits(x=out, layer=layer, vocab_size=VOCAB, scale=1.0, soft_cap=None))
    return program


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (lambda x, y, _: Add(x=x, residual=y, first=1), "8 columns from 1 on"),
        (lambda x, y, _: Join(x=x, y=x, out=y), "8 and 8 columns do not fit"),
        (lambda x, y, _: ResizeHeads(x=x, first=2, count=2, size=4, out=y), "8 columns from 2 on"),
        (
            lambda x, y, _: ResizeHeads(x=x, first=0, count=3, size=2, out=y),
            "3 heads do not fill 8",
        ),
    ],
)
def test_columns_that_are_not_there_are_refused(
    op: Callable[[Buffer, Buffer, Buffer], Op], message: str
) -> None:
    program = Program(torch.float32)
    x, y, z = program.buffer(8), program.buffer(8), program.buffer(8)
    with pytest.raises(ValueError, match=message):
        NativeStep(CpuKernels(), program_of(op(x, y, z), y, program, x, torch.ones(VOCAB, 8)), [])


@pytest.mark.parametrize("new_size", [2, 3, 5])
def test_heads_are_filled_up_or_cut(new_size: int) -> None:
    program = Program(torch.float32)
    x, out = program.buffer(8), program.buffer(2 + 2 * new_size)
    op = ResizeHeads(x=x, first=2, count=2, size=3, out=out)
    weight = torch.eye(VOCAB, out.width)
    step = NativeStep(CpuKernels(), program_of(op, out, program, x, weight), [])
    token_ids = torch.tensor([3, 1, 7])
    batch = make_inputs([3], [3])[3]
    got = step(token_ids, torch.arange(3), [], [batch], torch.arange(3))[:, : out.width]
    rows = token_ids[:, None] * 8.0 + torch.arange(8)
    heads = F.pad(rows[:, 2:].view(3, 2, 3), (0, 4))[..., :new_size]
    assert torch.equal(got, torch.cat((rows[:, :2], heads.flatten(1)), dim=1))


def test_attention_to_chosen_keys_needs_a_choice() -> None:
    """As in a stage whose first layers share the choice of a layer before them."""
    program = Program(torch.float32)
    x, found = program.buffer(64), program.buffer(32)
    attend = Attend(
        x=x, layer=0, num_heads=1, num_kv_heads=1, head_dim=64, scale=1.0, traits=PLAIN, out=found,
        rank=32, sparse=True,
    )  # fmt: skip
    kernels = CpuKernels()
    layer = kernels.pack_linear(torch.zeros(VOCAB, 32), None)
    program.add(Embed(weight=torch.zeros(VOCAB, 64), scale=1.0, out=x))
    program.add(attend)
    program.add(Logits(x=found, layer=layer, vocab_size=VOCAB, scale=1.0, soft_cap=None))
    cache = torch.zeros(kv_cache_shape(NUM_PAGES, 1, PAGE_SIZE, 64, torch.float32))
    with pytest.raises(CannotRecord, match="keys that no layer has chosen"):
        NativeStep(kernels, program, [(cache,)])


def test_each_group_of_caches_has_its_own_pages() -> None:
    """The first layer's pages come in another order, and are fewer than those of the others; it is
    of the second group."""
    kernels, weights = CpuKernels(num_threads=2), make_weights(torch.float32, variant=False)
    token_ids, positions, write_index, batch, logits_index = make_inputs([20, 3], [20, 3])
    batch = replace(batch, page_table=batch.page_table + 5, cache={})
    write_index = write_index + 5 * PAGE_SIZE  # beyond the pages of the second group
    table = torch.tensor([[6, 2, 0], [4, 0, 0]], dtype=torch.int32)
    other = replace(batch, page_table=table, cache={})
    pages = torch.cat((table[0, positions[:20] // PAGE_SIZE], table[1, :1].expand(3))).long()
    other_index = pages * PAGE_SIZE + positions % PAGE_SIZE
    one_group, two_groups = make_caches(torch.float32), make_caches(torch.float32)
    two_groups[0] = (two_groups[0][0][:7].clone(), two_groups[0][1][:7].clone())
    first = make_step(kernels, weights, one_group)
    want = call(first, token_ids, positions, write_index, batch, logits_index)
    step = make_step(kernels, weights, two_groups, (1, 0, 0))
    groups = [write_index, other_index], [batch, other]
    assert torch.equal(step(token_ids, positions, *groups, logits_index), want)
    assert torch.equal(two_groups[0][0][6], one_group[0][0][6])
    with pytest.raises(ValueError, match="there are 1 write indices for 2 groups of caches"):
        step(token_ids, positions, [write_index], [batch, other], logits_index)
    other_index[0] = 7 * PAGE_SIZE
    with pytest.raises(IndexError, match=r"write_index\[0\] is 112"):
        step(token_ids, positions, *groups, logits_index)
