"""Compiles attention kernels for the H200, which needs no GPU, and prints what each takes.

A script of its own, because kernels that were imported for the interpreter cannot be compiled. One
line of JSON per kernel: name, bytes of shared memory, registers per thread, bytes of stack (to
which registers are spilled)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sapwood.kernels.triton.attention_decode import decode_kernel
from sapwood.kernels.triton.attention_extend import extend_kernel
from sapwood.kernels.triton.attention_merge import merge_kernel
from sapwood.kernels.triton.attention_shared import shared_kernel
from sapwood.kernels.triton.attention_sizes import tile_sizes

_GROUP = 4
H200 = GPUTarget("cuda", 90, 32)
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_INT32 = ("page_table", "context_len", "query_start", "shared_len", "tile_tokens", "tile_requests")
_FLOAT32 = ("parts", "part_lse", "sinks", "alibi")
_SCALES = ("key_scales", "value_scales")
_ONE_PART = ("parts", "part_lse", "shared_len")


def compile_kernel(
    kernel: Any,
    constants: dict[str, Any],
    dtype: torch.dtype,
    absent: tuple[str, ...],
    **options: int,
) -> dict[str, int]:
    """`absent` pointers are None."""
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in absent or name in constants:
            signature[name], constexprs[(index,)] = "constexpr", constants.get(name)
        elif name in _SCALES:
            signature[name] = "*bf16"
        elif name in ("key_cache", "value_cache") and constants.get("KV"):
            signature[name] = "*u8"
        elif name in ("q", "key_cache", "value_cache", "out"):
            signature[name] = f"*{_NAMES[dtype]}"
        elif name == "sees":
            signature[name] = "*i64"
        elif name in _INT32 or name in _FLOAT32:
            signature[name] = "*i32" if name in _INT32 else "*fp32"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        is_aligned = signature[name].startswith("*") or (
            name.endswith("_stride") and name != "page_table_stride"
        )
        if is_aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(source, target=H200, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{word}:(\d+)", usage)[-1]) for word in ("REG", "STACK"))
    return {"shared": compiled.metadata.shared, "registers": registers, "stack": stack}


def compile_attention(
    kernel: Any,
    tokens: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    kv: str,
    *,
    traits: bool,
    tree: bool,
    parts: bool,
) -> dict[str, int]:
    sizes = tile_sizes(tokens, _GROUP, head_dim, dtype)
    constants = {
        "GROUP": _GROUP, "HEAD_DIM": head_dim, "PAGE_SIZE": page_size, "KV": kv,
        "SOFT_CAP": 30.0 if traits else 0.0, "WINDOW": 1024 if traits else 0,
        "BLOCK_M": sizes.block_m, "BLOCK_N": sizes.block_n, "BLOCK_D": sizes.block_d,
        "MIN_CHUNK": 128,
    }  # fmt: skip
    absent = () if parts else _ONE_PART
    if not kv:
        absent += _SCALES
    if not traits:
        absent += ("sinks", "alibi")
    if not tree:
        absent += ("sees",)
    return compile_kernel(
        kernel, constants, dtype, absent, num_warps=sizes.num_warps, num_stages=sizes.num_stages
    )


def main(wanted: list[str]) -> None:
    """Of each case "kernel tokens head_dim page_size dtype kv traits parts" the resources."""
    kernels = {"decode": decode_kernel, "extend": extend_kernel, "shared": shared_kernel}
    for case in wanted:
        name, tokens, head_dim, page_size, dtype, kv, traits, parts = case.split()
        if name == "merge":
            constants = {"HEAD_DIM": int(head_dim), "BLOCK_D": int(head_dim), "BLOCK_P": 16}
            taken = compile_kernel(merge_kernel, constants, torch.bfloat16, (), num_warps=4)
        else:
            taken = compile_attention(
                kernels[name], int(tokens), int(head_dim), int(page_size), getattr(torch, dtype),
                "" if kv == "dense" else kv,
                traits=traits == "traits", tree=traits == "tree", parts=parts == "parts",
            )  # fmt: skip
        print(json.dumps({"case": case} | taken), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
