"""The parts of `sapwood bench gpu`, the most useful first, until the time is used up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rich.console import Console

from sapwood.base.errors import ConfigError, SapwoodError
from sapwood.bench.gpu.engines import EngineUnderTest, median, open_engine
from sapwood.bench.gpu.idle import measure_idle
from sapwood.bench.gpu.limits import Limits, measure_limits
from sapwood.bench.gpu.options import GpuOptions
from sapwood.bench.gpu.shapes import Shape, shapes
from sapwood.bench.gpu.transformers_peer import TransformersPeer, open_transformers
from sapwood.kernels.conformance.checks import Case, CheckResult
from sapwood.kernels.conformance.suite import run_checks
from sapwood.kernels.platform import Platform, find_device, read_platform
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.registry import Need, select_kernels

VARIANTS: dict[str, dict[str, Any]] = {
    "graphs, overlap": {},
    "graphs": {"disable_overlap_schedule": True},
    "overlap": {"disable_graphs": True},
    "neither": {"disable_graphs": True, "disable_overlap_schedule": True},
}
BEST = "graphs, overlap"
AIMS = {"decode": 0.75, "prefill": 0.55, "idle": 0.03, "batching": 3.0}


def device_of(options: GpuOptions, platform: Platform) -> torch.device:
    """The device of that name; ConfigError if there is none, or if it is only fit for --quick."""
    device = find_device(options.device or "cuda", platform)
    if device.type == "cpu" and not options.quick:
        raise ConfigError(
            "bench gpu measures a GPU; with --quick it runs a tiny version of the same on the "
            "CPU, and `sapwood bench offline` measures a CPU"
        )
    return device


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes of the workloads."""

    prompt_tokens: int
    decode_tokens: int
    prefill_tokens: int
    num_running: int
    profiled_turns: int
    num_requests: int
    request_tokens: int
    repeats: int


FULL = Sizes(
    prompt_tokens=128,
    decode_tokens=128,
    prefill_tokens=8192,
    num_running=64,
    profiled_turns=20,
    num_requests=256,
    request_tokens=256,
    repeats=3,
)
QUICK = Sizes(
    prompt_tokens=12,
    decode_tokens=6,
    prefill_tokens=32,
    num_running=4,
    profiled_turns=4,
    num_requests=6,
    request_tokens=8,
    repeats=1,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number.

    share  share of the limit, or multiple of the peer's figure; None: there is nothing to compare
    aim    the least share that is wanted (for idle time, the largest); None: there is no aim
    """

    model: str
    what: str
    variant: str
    value: float
    unit: str
    share: float | None = None
    aim: float | None = None


@dataclass(slots=True)
class Report:
    """All figures; `left_out` has the parts without figures, and the reasons."""

    device: str
    kernels: str = ""
    checks: list[CheckResult] = field(default_factory=list)
    limits: Limits | None = None
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0


class GpuBench:
    def __init__(self, options: GpuOptions, console: Console) -> None:
        platform = read_platform()
        self._device = device_of(options, platform)
        name = platform.cpu_name
        if self._device.type == "cuda":
            name = platform.device_names[self._device.index or 0]
        self.report = Report(device=name)
        self._options = options
        self._console = console
        self._sizes = QUICK if options.quick else FULL
        self._start_s = time.perf_counter()
        self._dtype = torch.bfloat16

    def run(self) -> Report:
        self._part("kernel checks", self._check)
        self._part("limits", self._limits)
        for shape in shapes(quick=self._options.quick):
            for variant in VARIANTS:
                part = f"{shape.name}, {variant}"
                self._part(part, partial(self._engine, shape, variant))
            if self._options.peers:
                self._part(f"{shape.name}, transformers", partial(self._peer, shape))
        self.report.seconds = time.perf_counter() - self._start_s
        return self.report

    def _part(self, name: str, run: Callable[[], None]) -> None:
        """One part's failure is named, and does not end the others."""
        elapsed = time.perf_counter() - self._start_s
        if elapsed > self._options.budget:
            self.report.left_out.append(f"{name}: {elapsed:.0f} s of --budget were used up")
            return
        self._console.print(f"{elapsed:5.0f} s  {name}", markup=False, highlight=False)
        try:
            run()
        except (
            SapwoodError,
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            ImportError,
        ) as error:
            self.report.left_out.append(f"{name}: {type(error).__name__}: {error}")

    # ---- the device --------------------------------------------------------------------------

    def _check(self) -> None:
        heads = [(4, 2, 32)] if self._options.quick else [(16, 8, 128), (32, 8, 128), (8, 1, 64)]
        need = Need(device=self._device.type, dtype=self._dtype, head_dim=heads[0][2], page_size=16)
        chosen = select_kernels(need)
        self.report.kernels = chosen.why
        cases = [
            Case(
                device=self._device,
                dtype=dtype,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                page_size=16,
            )
            for dtype in (torch.bfloat16, torch.float32)
            for num_heads, num_kv_heads, head_dim in heads
        ]
        self.report.checks = list(run_checks(chosen.kernels, ReferenceKernels(), cases))

    def _limits(self) -> None:
        self.report.limits = measure_limits(self._device, quick=self._options.quick)

    # ---- engines -----------------------------------------------------------------------------

    def _engine(self, shape: Shape, variant: str) -> None:
        sizes = self._sizes
        longest = sizes.prefill_tokens
        options = {
            "device": str(self._device),
            "dtype": "bfloat16",
            "context_length": min(longest, int(shape.config["max_position_embeddings"])),
            "chunked_prefill_size": longest,
            "max_running_requests": sizes.num_requests,
            **VARIANTS[variant],
        }
        if self._device.type == "cpu":
            options["max_total_tokens"] = 4096
        with open_engine(shape, options) as engine:
            self.report.notes.append(f"{shape.name}, {variant}: {engine.graphs}")
            for figure in self._figures(shape, variant, engine):
                self.report.figures.append(figure)

    def _figures(self, shape: Shape, variant: str, engine: EngineUnderTest) -> Iterator[Figure]:
        sizes, limits = self._sizes, self.report.limits

        def figure(
            what: str, value: float, unit: str, share: float | None, aim: str = ""
        ) -> Figure:
            is_aimed = aim and variant == BEST and (shape.name == "Llama-3-8B" or aim == "idle")
            return Figure(
                model=shape.name,
                what=what,
                variant=variant,
                value=value,
                unit=unit,
                share=share,
                aim=AIMS[aim] if is_aimed else None,
            )

        engine.run(1, sizes.prompt_tokens, 4)
        times = [
            (run.last_token_s - run.first_token_s) / (sizes.decode_tokens - 1)
            for run in (
                engine.run(1, sizes.prompt_tokens, sizes.decode_tokens)
                for _ in range(sizes.repeats)
            )
        ]
        token_s = median(times)
        context = sizes.prompt_tokens + sizes.decode_tokens // 2
        read = shape.bytes_per_step(context=context, dtype_bytes=self._dtype.itemsize)
        share = None if limits is None else read / token_s / limits.copy_bytes_s
        yield figure("single-stream decode", 1 / token_s, "tok/s", share, "decode")

        # One token less than the context has room for, since one is put out.
        num_tokens = sizes.prefill_tokens - 1
        engine.run(1, num_tokens, 1)
        prefill_s = median(
            [engine.run(1, num_tokens, 1).first_token_s for _ in range(sizes.repeats)]
        )
        flop_s = shape.flop_of_prefill(num_tokens) / prefill_s
        share = None if limits is None else flop_s / limits.flop_s
        yield figure(f"prefill of {num_tokens}", num_tokens / prefill_s, "tok/s", share, "prefill")

        engine.ask(sizes.num_running, sizes.prompt_tokens, 4 * sizes.profiled_turns)
        engine.turn(2 * sizes.profiled_turns)
        idle = measure_idle(lambda: engine.turn(sizes.profiled_turns), self._device)
        engine.finish()
        yield figure(f"idle at {sizes.num_running} running", 100 * idle, "%", idle, "idle")
        if variant == BEST:
            run = engine.run(sizes.num_requests, sizes.request_tokens, sizes.request_tokens)
            rate = run.num_output_tokens / run.last_token_s
            yield figure(self._throughput, rate, "tok/s", None)

    @property
    def _throughput(self) -> str:
        tokens = self._sizes.request_tokens
        return f"{self._sizes.num_requests} requests, {tokens} + {tokens}"

    def _peer(self, shape: Shape) -> None:
        sizes = self._sizes
        with open_transformers(shape, self._device, self._dtype) as peer:
            self._compare(shape, "generate", "single-stream decode", self._decode_rate(peer))
            rate = peer.batching_tok_s(
                sizes.num_requests, sizes.request_tokens, sizes.request_tokens
            )
            self._compare(shape, "continuous batching", self._throughput, rate)

    def _decode_rate(self, peer: TransformersPeer) -> float:
        return 1 / peer.decode_s(self._sizes.prompt_tokens, self._sizes.decode_tokens)

    def _compare(self, shape: Shape, peer: str, what: str, rate: float) -> None:
        """The peer's figure, whose share says how many times as fast the best engine is."""
        ours = [
            figure.value
            for figure in self.report.figures
            if (figure.model, figure.what, figure.variant) == (shape.name, what, BEST)
        ]
        self.report.figures.append(
            Figure(
                model=shape.name,
                what=what,
                variant=f"transformers, {peer}",
                value=rate,
                unit="tok/s",
                share=ours[0] / rate if ours else None,
                aim=AIMS["batching"] if peer == "continuous batching" and ours else None,
            )
        )
