"""`sapwood bench gpu`: measure, show, write."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from sapwood.bench.environment import describe_environment
from sapwood.bench.gpu.measure import Figure, GpuBench
from sapwood.bench.gpu.options import GpuOptions
from sapwood.bench.report import (
    OutputOptions,
    number_text,
    options_json,
    report_stem,
    write_json,
)
from sapwood.kernels.conformance.report import check_table


def bench_gpu(options: GpuOptions, output: OutputOptions, console: Console) -> bool:
    """Run the benchmark. Returns False if a check failed; ConfigError if the device is missing."""
    environment = describe_environment()
    report = GpuBench(options, console).run()
    console.print(f"{report.device}; {environment}", markup=False, soft_wrap=True)
    console.print(check_table(f"kernels: {report.kernels}", report.checks))
    if report.limits is not None:
        console.print(
            f"copy {report.limits.copy_bytes_s / 1e9:.1f} GB/s (read and written), "
            f"bf16 products {report.limits.flop_s / 1e12:.2f} TFLOP/s",
            markup=False,
        )
    console.print(figure_table(report.figures))
    for line in (*report.notes, *(f"left out: {reason}" for reason in report.left_out)):
        console.print(line, markup=False, soft_wrap=True)
    if options.quick:
        console.print("a quick run: its figures say nothing about speed", style="yellow")
    path = (
        Path(output.output_dir)
        / f"{report_stem('gpu', ['quick' if options.quick else 'full'], environment)}.json"
    )
    write_json(
        path,
        {
            "kind": "gpu",
            "environment": environment,
            "options": options_json(options, output),
            "report": report,
        },
    )
    if output.plot and report.figures:
        from sapwood.bench.gpu.plot import plot_figures

        plot_figures(report, path.with_suffix(".png"))
    console.print(f"written: {path}", markup=False, soft_wrap=True)
    return bool(report.checks) and all(check.passed for check in report.checks)


def figure_table(figures: list[Figure]) -> Table:
    table = Table("model", "what", "variant", "value", "of the limit, or x", "aim")
    for figure in figures:
        is_ratio = figure.variant.startswith("transformers")
        share = (
            "-"
            if figure.share is None
            else f"{figure.share:.2f} x"
            if is_ratio
            else f"{figure.share:.1%}"
        )
        aim = (
            "-" if figure.aim is None else f"{figure.aim:g} x" if is_ratio else f"{figure.aim:.0%}"
        )
        value = f"{number_text(figure.value)} {figure.unit}"
        table.add_row(figure.model, figure.what, figure.variant, value, share, aim)
    return table
