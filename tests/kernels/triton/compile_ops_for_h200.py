"""Compiles the ops' kernels for the H200, which needs no GPU, and prints what they take.

A script of its own, because kernels that were imported for the interpreter cannot be compiled. One
line of JSON per kernel: name and bytes of shared memory. With --all-sizes a kernel is also compiled
for numbers of tokens and of heads that change nothing but the size of its tiles."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sapwood.kernels.activations import Activation
from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.kv_cache import kv_cache_shape
from sapwood.kernels.sampling_settings import SamplingSettings
from sapwood.kernels.state_forms import DeltaForm, GatedNormForm
from sapwood.kernels.triton.ops import TritonKernels
from tests.kernels.test_coded import random_weight as random_codes
from tests.kernels.test_low_rank import addition, rows_of
from tests.kernels.test_quantized import random_weight
from tests.kernels.test_state_space import layer_of, text_of


class AbsentH200:
    """What Triton asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


_run = JITFunction.run


def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    kernel = _run(self, *args, grid=grid, warmup=True, **kwargs)
    line = {"name": self.fn.__name__, "shared": kernel.metadata.shared}
    print(json.dumps(line), flush=True)  # noqa: T201
    return kernel


def call_every_op(*, all_sizes: bool) -> None:
    """The results are whatever memory held: no kernel runs."""
    kernels, bf16 = TritonKernels(), torch.bfloat16
    x, norm = torch.zeros(4, 1024, dtype=bf16), torch.zeros(1024, dtype=bf16)
    kernels.rms_norm(x, norm, 1e-6)
    kernels.add_rms_norm(x, x.clone(), norm, 1e-6)
    kernels.layer_norm(x, norm, None, 1e-6)
    rows = torch.zeros(4, 1024, dtype=torch.uint8)
    for columns in (slice(0, 1024), slice(3, 900)):
        kernels.carry_rows(rows[:, columns], rows.clone()[:, columns], [0, 1], [2, 3])
    for activation in Activation:
        kernels.activate(x, activation)
        kernels.activate_and_mul(x, activation)
    kernels.embedding(torch.zeros(4, dtype=torch.int64), x)
    caches = {
        dtype: torch.zeros(kv_cache_shape(4, 8, 16, 128, dtype), dtype=torch.uint8).view(dtype)
        for dtype in (torch.int8, torch.float8_e4m3fn)
    } | {bf16: torch.zeros(4, 8, 16, 128, dtype=bf16)}
    for cache in caches.values():
        kernels.qk_norm_rope_write_kv(
            torch.zeros(4, 32 * 128, dtype=bf16),
            num_heads=16,
            num_kv_heads=8,
            head_dim=128,
            q_norm=norm[:128],
            k_norm=norm[:128],
            eps=1e-6,
            cos_sin=torch.zeros(9, 128),
            positions=torch.zeros(4, dtype=torch.int64),
            key_cache=cache,
            value_cache=cache,
            write_index=torch.zeros(4, dtype=torch.int64),
        )
    batch = AttentionBatch(
        page_table=torch.zeros(2, 1, dtype=torch.int32),
        query_start=torch.tensor([0, 1, 4], dtype=torch.int32),
        context_len=torch.tensor([5, 3], dtype=torch.int32),
        query_lens=(1, 3),
        context_lens=(5, 3),
        num_decodes=1,
    )
    for dtype, head_counts in ((bf16, (16,)), (torch.int8, (128,))):
        rows = torch.zeros(kv_cache_shape(4, 1, 16, 576, dtype), dtype=dtype)
        for heads in (16, 128) if all_sizes else head_counts:
            queries = torch.zeros(4, heads, 576, dtype=bf16)
            kernels.latent_attention(queries, rows, batch, 0.1, 512)
            index = torch.zeros(kv_cache_shape(4, 1, 16, 128, dtype), dtype=dtype)
            of_index = torch.zeros(4, 64, 128, dtype=bf16)
            chosen = kernels.choose_keys(of_index, torch.zeros(4, 64), index, batch, 2048)
            kernels.sparse_latent_attention(queries, rows, batch, 0.1, 512, chosen)
    long = replace(batch, page_table=torch.zeros(2, 512, dtype=torch.int32), cache={})
    kernels.latent_attention(torch.zeros(4, 16, 576), torch.zeros(4, 1, 16, 576), long, 0.1, 512)
    for bias in (None, norm):
        states, slots = torch.zeros(4, 1024, 2, dtype=bf16), torch.zeros(2, dtype=torch.int64)
        kernels.causal_conv(x, torch.zeros(1024, 3, dtype=bf16), bias, states, slots, batch)
    call_delta_rules(kernels, batch)
    logits = torch.zeros(2, 151_936)
    kernels.argmax(logits)
    kernels.mask_logits(logits, torch.zeros(2, 4748, dtype=torch.int32), [0, 1])
    ids, counts = torch.zeros(5, dtype=torch.int64), torch.zeros(5)
    kernels.penalise(logits[0], ids, counts, repetition=1.0, frequency=1.0, presence=1.0)
    filters = {"temperature": [1.0] * 2, "top_k": [1] * 2, "top_p": [1.0] * 2}
    kernels.sample(logits, SamplingSettings(**filters, min_p=[1.0] * 2, numbers=[0.0] * 2))
    for kind, rows in (("int8", 4), ("q8_0", 4), ("q4_1", 64)):
        weight = random_weight(kind, 256, 256)
        kernels.pack_quantized_linear([weight], None, bf16)(x[:1, :256].repeat(rows, 1))
    for codes, group, rows in (
        ("e4m3", 256, 200), ("fp4", 16, 1), ("int4", 128, 200), ("nf4", 64, 1), ("int8", 24, 200),
    ):  # fmt: skip
        coded = random_codes(codes, (256, 256, group), shifts=codes == "int4")
        kernels.pack_quantized_linear([coded], None, bf16)(x[:1, :256].repeat(rows, 1))
    for group in (256, 128):
        fp8 = replace(random_codes("e4m3", (256, 256, group)), rounds_inputs=True)
        kernels.pack_quantized_linear([fp8], None, bf16)(x[:, :256])
    call_experts(kernels, all_sizes=all_sizes)
    rows = rows_of([0, -1, 1, 0])
    for dtype in (bf16, torch.float32) if all_sizes else (bf16,):
        layer = kernels.low_rank(1024, 512)
        for slot, rank in enumerate((4, 64)):
            layer.place(slot, addition(1024, [(0, 256, rank), (256, 128, rank)], dtype))
        layer.add(x.to(dtype), torch.zeros(4, 512, dtype=dtype), rows)


def call_delta_rules(kernels: TritonKernels, batch: AttentionBatch) -> None:
    """With a decay per head and per channel; a convolution before, and a gated norm after."""
    bf16, slots = torch.bfloat16, torch.zeros(2, dtype=torch.int64)
    x, weight = torch.zeros(4, 1024, dtype=bf16), torch.zeros(1024, 4, dtype=bf16)
    windows = torch.zeros(4, 1024, 3, dtype=bf16)
    kernels.causal_conv(x, weight, None, windows, slots, batch, silu=True)
    for num_shifts in (4, 4 * 128):
        form = DeltaForm(
            num_key_heads=2, num_heads=4, key_dim=128, value_dim=128, rate=torch.zeros(4),
            shift=torch.zeros(num_shifts),
        )  # fmt: skip
        states = torch.zeros(4, 4, 128, 128)
        decay, write = torch.zeros(4, num_shifts, dtype=bf16), torch.zeros(4, 4, dtype=bf16)
        kernels.gated_delta_rule(x, decay, write, form, states, slots, batch)
    call_state_space(kernels, batch)
    for norm_first in (True, False):
        norm = GatedNormForm(group=128, eps=1e-6, norm_first=norm_first, logistic=norm_first)
        kernels.gated_rms_norm(x, x, x[0], norm)


def call_state_space(kernels: TritonKernels, batch: AttentionBatch) -> None:
    layer = layer_of("mamba 2", heads=4, head_dim=64, groups=1, state_size=128)
    text, states = text_of(layer, 4, torch.bfloat16), torch.zeros(4, *layer.shape)
    slots = torch.zeros(2, dtype=torch.int64)
    kernels.selective_scan(text.x, text.b, text.c, text.dt, layer, states, slots, batch)


def call_experts(kernels: TritonKernels, *, all_sizes: bool) -> None:
    """Experts of dense weights, GGUF blocks, codes with shifts, int8 and FP8 in blocks; each with
    one token, few or many, or with all three numbers."""
    bf16, layers = torch.bfloat16, []
    for shape in ((512, 256), (256, 256)):
        bias = torch.zeros(shape[0], dtype=bf16)
        fp8 = replace(random_codes("e4m3", (*shape, 128)), rounds_inputs=True)
        parts = [random_weight("q4_1", *shape), random_codes("int4", (*shape, 64), shifts=True)]
        parts += [random_weight("int8", *shape), fp8]
        dense = [kernels.pack_linear(torch.zeros(shape, dtype=bf16), bias)] * 4
        layers.append(
            [dense, *([kernels.pack_quantized_linear([one], bias, bf16)] * 4 for one in parts)]
        )
    numbers = [1, 100, 400]
    for at, (gate_up, down) in enumerate(zip(*layers, strict=True)):
        experts = kernels.pack_experts(gate_up, down, Activation.SILU)
        for num_tokens in numbers if all_sizes else [numbers[at % 3]]:
            chosen = torch.zeros(num_tokens, 2, dtype=torch.int64)
            experts(torch.zeros(num_tokens, 256, dtype=bf16), chosen, chosen.float())


if __name__ == "__main__":
    driver.set_active(AbsentH200())
    JITFunction.run = compile_only
    call_every_op(all_sizes="--all-sizes" in sys.argv)
