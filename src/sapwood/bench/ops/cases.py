"""The measured ops, with the sizes of a model's step, and the bytes and operations of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.bench.ops.options import EXPERTS, Shape
from sapwood.kernels.activations import Activation
from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.interface import Kernels
from sapwood.kernels.kv_cache import is_8_bit, kv_cache_shape, write
from sapwood.kernels.large_pages import large_pages
from sapwood.kernels.latent import LatentSizes
from sapwood.kernels.packed import PackedExperts, PackedLinear
from sapwood.kernels.sampling_settings import SamplingSettings

Make = Callable[[Kernels], Callable[[], object]]

COLD_BYTES = 256 << 20
"""Bytes of weights and KV that are used in turn, so that no processor cache holds them."""
PAGE_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One op with its sizes.

    setting         the sizes in words
    num_bytes       bytes that must be read or written at least
    operations      operations that must be done at least
    make            makes the inputs, and returns a function that calls the kernels' op
    """

    op: str
    setting: str
    num_bytes: int
    num_operations: int
    make: Make


def all_cases(
    shape: Shape, rows: Sequence[int], context: int, dtype: torch.dtype
) -> Iterator[Case]:
    """All cases.

    rows     numbers of new tokens in a step
    context  tokens that decodes attend to
    """
    for num in rows:
        yield from _row_cases(shape, num, dtype)
        yield from _linear_cases(shape, num, dtype)
    if shape.num_experts:
        yield from _expert_cases(shape, rows, dtype)
    for num in rows:
        if num <= 64:
            yield from _sampling_cases(shape, num)
            if shape.latent is None:
                yield _attention(shape, [1] * num, [context] * num, dtype)
            else:
                yield from _latent_cases(shape.latent, num, context, dtype)
        elif shape.latent is None:
            yield _attention(shape, [num], [num], dtype)
            yield _attention(shape, [num], [num + context], dtype)


def _row_cases(shape: Shape, num: int, dtype: torch.dtype) -> Iterator[Case]:
    size = dtype.itemsize
    x = torch.randn(num, shape.hidden, dtype=dtype)
    weight = torch.ones(shape.hidden, dtype=dtype)
    moved = num * shape.hidden * size
    yield Case(
        op="rms_norm",
        setting=f"{num} x {shape.hidden}",
        num_bytes=2 * moved,
        num_operations=0,
        make=lambda kernels: lambda: kernels.rms_norm(x, weight, 1e-5),
    )
    yield Case(
        op="add_rms_norm",
        setting=f"{num} x {shape.hidden}",
        num_bytes=4 * moved,
        num_operations=0,
        make=lambda kernels: lambda: kernels.add_rms_norm(x, x.clone(), weight, 1e-5),
    )
    both = torch.randn(num, 2 * shape.inner, dtype=dtype)
    yield Case(
        op="activate_and_mul",
        setting=f"{num} x {shape.inner}",
        num_bytes=3 * num * shape.inner * size,
        num_operations=0,
        make=lambda kernels: lambda: kernels.activate_and_mul(both, Activation.SILU),
    )
    table = torch.randn(shape.vocab, shape.hidden, dtype=dtype)
    ids = torch.randint(shape.vocab, (num,))
    yield Case(
        op="embedding",
        setting=f"{num} of {shape.vocab} x {shape.hidden}",
        num_bytes=2 * moved,
        num_operations=0,
        make=lambda kernels: lambda: kernels.embedding(ids, table),
    )
    yield _rotation(shape, num, dtype)


def _rotation(shape: Shape, num: int, dtype: torch.dtype) -> Case:
    heads = shape.num_heads + 2 * shape.num_kv_heads
    qkv = torch.randn(num, heads * shape.head_dim, dtype=dtype)
    pages = -(-num // PAGE_SIZE)
    keys, values = (
        torch.zeros(
            kv_cache_shape(pages, shape.num_kv_heads, PAGE_SIZE, shape.head_dim), dtype=dtype
        )
        for _ in range(2)
    )
    norm = torch.ones(shape.head_dim, dtype=dtype)
    index = torch.arange(num)
    angles = torch.randn(num, shape.head_dim)

    def make(kernels: Kernels) -> Callable[[], object]:
        return lambda: kernels.qk_norm_rope_write_kv(
            qkv.clone(),
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            q_norm=norm,
            k_norm=norm,
            eps=1e-6,
            cos_sin=angles,
            positions=index,
            key_cache=keys,
            value_cache=values,
            write_index=index,
        )

    return Case(
        op="qk_norm_rope_write_kv",
        setting=f"{num} x {heads} heads of {shape.head_dim}",
        num_bytes=2 * qkv.numel() * dtype.itemsize,
        num_operations=0,
        make=make,
    )


class _Mixture:
    """The experts of one kind of weights, packed once by each implementation."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self._shape = shape
        self._dtype = dtype
        self._kind: str | None = None
        self._packed: dict[str, PackedExperts] = {}

    def packed(self, kernels: Kernels, kind: str | None) -> PackedExperts:
        """The experts of `kind`; those of another kind are given up."""
        if kind != self._kind:
            self._packed = {}
            self._kind = kind
        if kernels.name not in self._packed:
            shape = self._shape
            self._packed[kernels.name] = kernels.pack_experts(
                self._side(kernels, 2 * shape.inner, shape.hidden),
                self._side(kernels, shape.hidden, shape.inner),
                Activation.SILU,
            )
        return self._packed[kernels.name]

    def _side(self, kernels: Kernels, num_out: int, num_in: int) -> list[PackedLinear]:
        """Equal numbers for all experts, in memory of their own: making numbers takes longest."""
        weight = torch.randn(num_out, num_in, dtype=self._dtype)
        experts = range(self._shape.num_experts)
        if self._kind is None:
            return [kernels.pack_linear(weight.clone(), None) for _ in experts]
        quantized = kernels.quantize_weight(weight, self._kind)
        return [kernels.pack_quantized_linear([quantized], None, self._dtype) for _ in experts]


def _expert_cases(shape: Shape, rows: Sequence[int], dtype: torch.dtype) -> Iterator[Case]:
    mixture = _Mixture(shape, dtype)
    for kind in (None, "int8", "q8_0", "q4_1"):
        for num in rows:
            yield _experts(shape, num, dtype, kind, mixture)


def _experts(
    shape: Shape, num: int, dtype: torch.dtype, kind: str | None, mixture: _Mixture
) -> Case:
    """A mixture whose tokens choose at random; only the experts that some token chose are read."""
    x = torch.randn(num, shape.hidden, dtype=dtype)
    scores = torch.rand(num, shape.num_experts)
    weights, chosen = scores.topk(shape.num_chosen, dim=-1)
    num_active = len(set(chosen.flatten().tolist()))
    numbers = 3 * shape.hidden * shape.inner

    def make(kernels: Kernels) -> Callable[[], object]:
        experts = mixture.packed(kernels, kind)
        # So that a few tokens meet other experts each time, as those of a text do.
        turns = itertools.cycle(range(0, shape.num_experts, shape.num_chosen))

        def call() -> Tensor:
            return experts(x, (chosen + next(turns)) % shape.num_experts, weights)

        return call

    return Case(
        op=f"{EXPERTS} {kind or str(dtype).removeprefix('torch.')}",
        setting=f"{num} x {shape.hidden}, {num_active} of {shape.num_experts} x {shape.inner}",
        num_bytes=int(num_active * numbers * bits_of(kind, dtype) / 8)
        + 2 * num * shape.hidden * dtype.itemsize,
        num_operations=2 * num * shape.num_chosen * numbers,
        make=make,
    )


def bits_of(kind: str | None, dtype: torch.dtype) -> float:
    """Bits that a weight takes on average."""
    return {None: 8.0 * dtype.itemsize, "int8": 8, "q8_0": 8.5, "q4_1": 5}[kind]


def _linear_cases(shape: Shape, num: int, dtype: torch.dtype) -> Iterator[Case]:
    sizes = ((shape.hidden, 2 * shape.inner), (shape.inner, shape.hidden))
    for num_in, num_out in sizes:
        yield _linear(num, num_in, num_out, dtype, None)
        for kind in ("int8", "q8_0", "q4_1"):
            yield _linear(num, num_in, num_out, dtype, kind)


def _linear(num: int, num_in: int, num_out: int, dtype: torch.dtype, kind: str | None) -> Case:
    x = torch.randn(num, num_in, dtype=dtype)
    weight_bytes = int(num_in * num_out * bits_of(kind, dtype) / 8)

    def make(kernels: Kernels) -> Callable[[], object]:
        # A layer is called again only after the weights of all other layers have been read.
        copies = max(1, COLD_BYTES // weight_bytes) if num <= 64 else 1
        weight = torch.randn(num_out, num_in, dtype=dtype)
        if kind is None:
            layers = [kernels.pack_linear(weight.clone(), None) for _ in range(copies)]
        else:
            quantized = kernels.quantize_weight(weight, kind)
            layers = [
                kernels.pack_quantized_linear([quantized], None, dtype) for _ in range(copies)
            ]
        turns = itertools.cycle(layers)
        return lambda: next(turns)(x)

    return Case(
        op=f"linear {kind or str(dtype).removeprefix('torch.')}",
        setting=f"{num} x {num_in} -> {num_out}",
        num_bytes=weight_bytes + num * (num_in + num_out) * dtype.itemsize,
        num_operations=2 * num * num_in * num_out,
        make=make,
    )


def _attention(
    shape: Shape, new: Sequence[int], contexts: Sequence[int], dtype: torch.dtype
) -> Case:
    num_new = sum(new)
    pages_each = [-(-context // PAGE_SIZE) for context in contexts]
    token_bytes = 2 * shape.num_kv_heads * shape.head_dim * dtype.itemsize
    num_copies = max(1, COLD_BYTES // (sum(pages_each) * PAGE_SIZE * token_bytes))
    q = torch.randn(num_new, shape.num_heads, shape.head_dim, dtype=dtype)
    # On average, a new token sees half of the new keys.
    seen = sum(n * (context - (n - 1) / 2) for n, context in zip(new, contexts, strict=True))

    def make(kernels: Kernels) -> Callable[[], object]:
        size = kv_cache_shape(
            sum(pages_each) * num_copies, shape.num_kv_heads, PAGE_SIZE, shape.head_dim
        )
        keys, values = _pool(size, dtype).normal_(), _pool(size, dtype).normal_()
        # The pages of a request are scattered over the pool, as they are after a while of serving.
        order = torch.randperm(size[0], dtype=torch.int32).view(num_copies, -1)
        turns = itertools.cycle([_batch(pages, pages_each, new, contexts) for pages in order])
        scale = shape.head_dim**-0.5

        def call() -> Tensor:
            batch = next(turns)
            batch.cache.clear()
            return kernels.paged_attention(q, keys, values, batch, scale)

        return call

    return Case(
        op="attention, decode" if max(new) == 1 else "attention, extend",
        setting=f"{len(new)} x {new[0]} new of {contexts[0]}",
        num_bytes=sum(contexts) * token_bytes + 2 * q.numel() * dtype.itemsize,
        num_operations=int(4 * seen * shape.num_heads * shape.head_dim),
        make=make,
    )


def _latent_cases(sizes: LatentSizes, num: int, context: int, dtype: torch.dtype) -> Iterator[Case]:
    """Decodes in the absorbed form, over rows in the activations' dtype and in 8 bits."""
    for cache_dtype in (dtype, torch.int8):
        yield _latent_decode(sizes, num, context, dtype, cache_dtype)


def _latent_decode(
    sizes: LatentSizes, num: int, context: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> Case:
    pages_each = [-(-context // PAGE_SIZE)] * num
    num_pages = sum(pages_each)
    size = kv_cache_shape(num_pages, 1, PAGE_SIZE, sizes.row, cache_dtype)
    token_bytes = size[-1] * cache_dtype.itemsize
    num_copies = max(1, COLD_BYTES // (num_pages * PAGE_SIZE * token_bytes))
    q = torch.randn(num, sizes.num_heads, sizes.row, dtype=dtype)

    def make(kernels: Kernels) -> Callable[[], object]:
        rows = torch.randn(num_pages * PAGE_SIZE, 1, sizes.row, dtype=dtype)
        filled = torch.empty(size, dtype=cache_dtype)
        if is_8_bit(cache_dtype):
            write(filled, torch.arange(len(rows)), rows)
        else:
            filled.copy_(rows.view(size))
        cache = _pool((num_copies * num_pages, *size[1:]), cache_dtype)
        cache.view(num_copies, *size).copy_(filled)
        order = torch.randperm(len(cache), dtype=torch.int32).view(num_copies, -1)
        batches = [_batch(pages, pages_each, [1] * num, [context] * num) for pages in order]
        turns = itertools.cycle(batches)
        scale = sizes.key_dim**-0.5

        def call() -> Tensor:
            batch = next(turns)
            batch.cache.clear()
            return kernels.latent_attention(q, cache, batch, scale, sizes.rank)

        return call

    return Case(
        op=f"latent attention, decode {str(cache_dtype).removeprefix('torch.')}",
        setting=f"{num} x 1 new of {context}",
        num_bytes=num * context * token_bytes + q.numel() * dtype.itemsize,
        num_operations=2 * num * context * sizes.num_heads * (sizes.row + sizes.rank),
        make=make,
    )


def _pool(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros, in large pages as an engine's pool."""
    num_bytes = math.prod(shape) * dtype.itemsize
    return large_pages(num_bytes)[:num_bytes].view(dtype).view(shape)


def _batch(
    pages: Tensor, pages_each: Sequence[int], new: Sequence[int], contexts: Sequence[int]
) -> AttentionBatch:
    table = torch.zeros(len(new), max(pages_each), dtype=torch.int32)
    for row, own in enumerate(torch.split(pages, list(pages_each))):
        table[row, : len(own)] = own
    starts = list(itertools.accumulate(new, initial=0))
    return AttentionBatch(
        page_table=table,
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_len=torch.tensor(contexts, dtype=torch.int32),
        query_lens=tuple(new),
        context_lens=tuple(contexts),
        num_decodes=sum(num_new == 1 for num_new in new),
    )


def _sampling_cases(shape: Shape, num: int) -> Iterator[Case]:
    logits = torch.randn(num, shape.vocab) * 4
    masks = torch.full((num, -(-shape.vocab // 32)), -1, dtype=torch.int32)
    setting = f"{num} x {shape.vocab}"
    num_bytes = logits.numel() * 4
    filters = {
        "sample": (-1, 1.0, 0.0),
        "sample, top-k": (40, 1.0, 0.0),
        "sample, top-p": (-1, 0.9, 0.0),
        "sample, min-p": (-1, 1.0, 0.05),
    }

    def sampling(
        top_k: int, top_p: float, min_p: float
    ) -> Callable[[Kernels], Callable[[], object]]:
        settings = SamplingSettings(
            temperature=[0.8] * num,
            top_k=[top_k] * num,
            top_p=[top_p] * num,
            min_p=[min_p] * num,
            numbers=[(0.5 + index) / num for index in range(num)],
        )
        return lambda kernels: lambda: kernels.sample(logits, settings)

    yield Case(
        op="argmax",
        setting=setting,
        num_bytes=num_bytes,
        num_operations=0,
        make=lambda kernels: lambda: kernels.argmax(logits),
    )
    for name, values in filters.items():
        yield Case(
            op=name,
            setting=setting,
            num_bytes=num_bytes,
            num_operations=0,
            make=sampling(*values),
        )
    yield Case(
        op="mask_logits",
        setting=setting,
        num_bytes=masks.numel() * 4,
        num_operations=0,
        make=lambda kernels: lambda: kernels.mask_logits(logits, masks, range(num)),
    )
