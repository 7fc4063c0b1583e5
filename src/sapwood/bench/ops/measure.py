"""Times the ops of two implementations in turn, and compares them with the machine's limits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sapwood.base.errors import ConfigError
from sapwood.bench.environment import describe_environment
from sapwood.bench.ops.cases import PAGE_SIZE, Case, all_cases
from sapwood.bench.ops.limits import Limits, measure_limits
from sapwood.bench.ops.options import SHAPES, OpsOptions
from sapwood.bench.plots import plot_shares
from sapwood.bench.report import OutputOptions, number_text, report_stem, write_json
from sapwood.kernels.interface import Kernels
from sapwood.kernels.kv_cache import DTYPES
from sapwood.kernels.platform import read_platform
from sapwood.kernels.registry import Need, select_kernels

BASELINE = "torch"
WIDTH = 100
"""Least width of the table in columns: a file has no width, and narrow terminals would wrap it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCost:
    """Medians in seconds.

    torch_s   time of the torch implementation; None: it has no such op
    limit_s   least time for the op's bytes and operations at the machine's limits
    """

    op: str
    setting: str
    own_s: float
    torch_s: float | None
    limit_s: float
    num_bytes: int
    num_operations: int

    @property
    def shares(self) -> dict[str, float]:
        """The share of the limit that each implementation reaches."""
        other = {} if self.torch_s is None else {BASELINE: self.limit_s / self.torch_s}
        return {"sapwood": self.limit_s / self.own_s, **other}


def measure_ops(options: OpsOptions, show_progress: bool = True) -> tuple[Limits, list[OpCost]]:
    """Measure the ops that the options name; ConfigError if there is no op of a name."""
    dtype = DTYPES[options.dtype]
    shape = SHAPES[options.shape_name]
    threads = options.num_threads or read_platform().num_cores
    need = Need(device="cpu", dtype=dtype, head_dim=shape.head_dim, page_size=PAGE_SIZE)
    own = select_kernels(need).kernels
    other = select_kernels(need, only=BASELINE).kernels
    torch.manual_seed(0)
    cases = [
        case
        for case in all_cases(shape, options.sizes, options.context, dtype)
        if not options.prefixes or case.op.startswith(options.prefixes)
    ]
    if not cases:
        raise ConfigError(
            f"--ops {options.ops!r} names no op of {options.shape_name}; "
            "leave it out to see them all"
        )
    limits = measure_limits(dtype, threads, [own, other])
    costs: list[OpCost] = []
    for case in track(cases, "measuring", transient=True, disable=not show_progress):
        costs.append(_measure(case, own, other, limits, threads, options.seconds))
    return limits, costs


def _measure(
    case: Case, own: Kernels, other: Kernels, limits: Limits, threads: int, seconds: float
) -> OpCost:
    with torch.inference_mode():
        taken = {
            kernels.name: _seconds(case, kernels, threads, seconds) for kernels in (own, other)
        }
    return OpCost(
        op=case.op,
        setting=case.setting,
        own_s=taken[own.name],
        torch_s=taken[other.name] if other.name != own.name else None,
        limit_s=limits.seconds(case.num_bytes, case.num_operations),
        num_bytes=case.num_bytes,
        num_operations=case.num_operations,
    )


def _seconds(case: Case, kernels: Kernels, threads: int, seconds: float) -> float:
    """The median of single calls; slow ones may be only one."""
    kernels.set_num_threads(threads)
    call: Callable[[], object] = case.make(kernels)
    call()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def ops_table(costs: Sequence[OpCost]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("op", "sizes", "us", "torch us", "x torch", "GB/s", "GFLOP/s", "limit"):
        table.add_column(name, justify="left" if name in ("op", "sizes") else "right", no_wrap=True)
    for cost in costs:
        other = cost.torch_s
        table.add_row(
            cost.op,
            cost.setting,
            number_text(cost.own_s * 1e6),
            "-" if other is None else number_text(other * 1e6),
            "-" if other is None else f"{other / cost.own_s:.2f}",
            number_text(cost.num_bytes / cost.own_s / 1e9),
            number_text(cost.num_operations / cost.own_s / 1e9) if cost.num_operations else "-",
            f"{cost.limit_s / cost.own_s:.0%}",
        )
    return table


def bench_ops(options: OpsOptions, output: OutputOptions, console: Console) -> None:
    """Measure, show, write."""
    environment = describe_environment()
    limits, costs = measure_ops(options, console.is_terminal)
    console.print(str(environment), markup=False)
    console.print(
        f"limits: {limits.bandwidth / 1e9:.1f} GB/s read, {limits.rate / 1e12:.2f} TFLOP/s of "
        f"{options.dtype} matrix products by the fastest here; small inputs stay in the cache, so "
        "that they may exceed the first, and products of bytes may exceed the second",
        markup=False,
    )
    Console(file=console.file, width=max(console.width, WIDTH)).print(ops_table(costs))
    stem = report_stem("ops", [options.shape_name], environment)
    result: dict[str, Any] = {
        "kind": "ops",
        "environment": environment,
        "options": asdict(options),
        "limits": asdict(limits),
        "ops": [asdict(cost) for cost in costs],
    }
    path = Path(output.output_dir) / f"{stem}.json"
    write_json(path, result)
    written = [path]
    if output.plot:
        written.append(path.with_suffix(".png"))
        shares = {f"{cost.op}, {cost.setting}": cost.shares for cost in costs}
        plot_shares(
            shares, f"{options.shape_name}, {options.dtype}: share of the limit", written[-1]
        )
    console.print(f"written: {', '.join(map(str, written))}", markup=False, soft_wrap=True)
