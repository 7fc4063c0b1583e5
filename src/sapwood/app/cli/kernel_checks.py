"""`sapwood kernels test`, after its options are parsed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console

from sapwood.base.errors import ConfigError
from sapwood.kernels.conformance.checks import Case, CheckResult
from sapwood.kernels.conformance.report import check_table
from sapwood.kernels.conformance.suite import CHECKS, run_checks
from sapwood.kernels.platform import find_device, read_platform
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.registry import Need, select_kernels

SHAPES = ((4, 2, 32), (8, 1, 128))
"""(heads of queries, of keys and values, head size)"""
PAGE_SIZE = 16


def check_kernels(
    name: str | None, asked: str, dtypes: Sequence[str], only: Sequence[str], console: Console
) -> bool:
    """Run the checks and show them. ConfigError for what is not here: kernels, device or check."""
    if unknown := sorted(set(only) - set(CHECKS)):
        raise ConfigError(f"no check {unknown[0]!r}; known: {', '.join(CHECKS)}")
    device = find_device(asked, read_platform())
    passed = True
    for dtype in (getattr(torch, dtype) for dtype in dtypes):
        results: list[CheckResult] = []
        for heads, kv_heads, head_dim in SHAPES:
            need = Need(device=device.type, dtype=dtype, head_dim=head_dim, page_size=PAGE_SIZE)
            selection = select_kernels(need, name)
            case = Case(
                device=device,
                dtype=dtype,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                page_size=PAGE_SIZE,
            )
            results += run_checks(selection.kernels, ReferenceKernels(), [case], only)
        title = f"{selection.kernels.name} on {device}, {str(dtype).removeprefix('torch.')}"
        console.print(check_table(title, results))
        passed = passed and all(result.passed for result in results)
    return passed
