"""`sapwood bench ranks`: starts the ranks, waits for what they have measured, shows it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from sapwood.base.errors import EngineUnavailable
from sapwood.base.process import describe_exit, end_in_order, hand_over, start_module
from sapwood.bench.distribution import Spread
from sapwood.bench.environment import describe_environment
from sapwood.bench.ranks.child import RESULT, Measured, RankTask
from sapwood.bench.ranks.options import RanksOptions
from sapwood.bench.ranks.paired import Paired
from sapwood.bench.report import OutputOptions, number_text, report_stem, write_json

CHILD = "sapwood.bench.ranks.child"
_POLL_S = 0.05


def measure_ranks(options: RanksOptions) -> Measured:
    """What the ranks have measured; EngineUnavailable if one of them fails, or takes too long."""
    with tempfile.TemporaryDirectory(prefix="sapwood-") as folder, ExitStack() as stack:
        children = []
        for rank in range(options.num_ranks):
            child = start_module(CHILD)
            stack.callback(end_in_order, child, 0.0)
            hand_over(
                child,
                msgspec.json.encode(RankTask(folder=folder, rank=rank, options=options)),
            )
            children.append(child)
        end = time.monotonic() + options.timeout
        while any(child.poll() is None for child in children):
            for rank, child in enumerate(children):
                if code := child.poll():
                    raise EngineUnavailable(f"rank {rank} {describe_exit(code)}")
            if time.monotonic() > end:
                raise EngineUnavailable(
                    f"the ranks have taken {options.timeout:g} s; raise --timeout, or measure "
                    "fewer --rows or --turns"
                )
            time.sleep(_POLL_S)
        result = Path(folder) / RESULT
        if not result.exists():
            raise EngineUnavailable(f"rank 0 {describe_exit(children[0].wait())} without a result")
        return msgspec.json.decode(result.read_bytes(), type=Measured)


def pairs_table(title: str, own: str, other: str, pairs: Sequence[Paired]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("rows", f"{own} us", f"{other} us", f"x {other}", "least", "most"):
        table.add_column(name, justify="right", no_wrap=True)
    for pair in pairs:
        ratio = Spread.of(pair.ratios)
        table.add_row(
            str(pair.num_rows),
            number_text(pair.own * 1e6),
            number_text(pair.other * 1e6),
            *(f"{value:.2f}" for value in (ratio.median, ratio.minimum, ratio.maximum)),
        )
    return table


def bench_ranks(options: RanksOptions, output: OutputOptions, console: Console) -> None:
    """Measure, show, write."""
    environment = describe_environment()
    measured = measure_ranks(options)
    console.print(str(environment), markup=False)
    what = f"{options.num_ranks} ranks, rows of {options.width} {options.dtype}"
    if measured.sums is None:
        console.print("sums: these ranks cannot share memory", markup=False)
    else:
        console.print(pairs_table(f"sums, {what}", "memory", "gloo", measured.sums))
    experts = f"{options.num_chosen} of {options.num_experts} experts"
    table = pairs_table(
        f"rows for {experts}, {what}", "send", "gather and add up", measured.expert_rows
    )
    console.print(table)
    result: dict[str, Any] = {
        "kind": "ranks",
        "environment": environment,
        "options": asdict(options),
        "sums": measured.sums,
        "expert_rows": measured.expert_rows,
    }
    stem = report_stem("ranks", [str(options.num_ranks)], environment)
    path = Path(output.output_dir).expanduser() / f"{stem}.json"
    write_json(path, result)
    written = [path]
    if output.plot:
        from sapwood.bench.plots import plot_repeats

        named = {"memory over gloo": measured.sums or [], "send over gather": measured.expert_rows}
        figures = {
            f"{name}, {pair.num_rows} rows": ("times as fast", pair.ratios)
            for name, pairs in named.items()
            for pair in pairs
        }
        written.append(path.with_suffix(".png"))
        plot_repeats(figures, what, written[-1])
    console.print(f"written: {', '.join(map(str, written))}", markup=False, soft_wrap=True)
