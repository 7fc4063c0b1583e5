"""The preparations of an engine on a GPU: it measures its memory, and captures its steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from sapwood.app.building.loading import LoadWatch
from sapwood.app.building.resolving import Resolved
from sapwood.base.errors import ConfigError
from sapwood.executor import captured
from sapwood.executor.buckets import decode_sizes, parse_sizes, prefill_sizes
from sapwood.executor.cache_inputs import CachePlaces
from sapwood.executor.captured import Capturable, StepsWithAdapters, capture_steps
from sapwood.executor.captured_memory import CapturePlan
from sapwood.executor.largest_step import run_largest_steps
from sapwood.executor.recorded import Recorded
from sapwood.kernels.accelerators import DeviceMemory
from sapwood.kernels.capture import Capture
from sapwood.kernels.interface import Kernels
from sapwood.kernels.kv_cache import DTYPES
from sapwood.kernels.transfer import runs_ahead
from sapwood.memory.buffers import allocate_caches
from sapwood.memory.sizing import MemoryUse, PoolSize, size_pool
from sapwood.models.config import DecoderConfig
from sapwood.models.foreign.structure import ForeignConfig
from sapwood.schema.cache import CachePlan
from sapwood.schema.config.decision import Decision
from sapwood.schema.config.engine import ResolvedConfig
from sapwood.schema.config.resolve import POOL_CONTEXTS

log = logging.getLogger(__name__)

LARGEST_CAPTURED_PREFILL = 4096
"""Most tokens of a captured step: a larger step takes longer to compute than to queue."""
LARGEST_CAPTURED_DECODE = 512
GRAPH_OVERHEAD_BYTES = 512 * 2**20
"""Memory for the descriptions of captured steps, beside the memory in which they compute."""


def why_not_captured(resolved: Resolved) -> str | None:
    """Why a GPU queues the ops of a model's steps one by one; None: it captures them."""
    kernels, parallel = resolved.kernels.kernels, resolved.config.parallel
    if resolved.config.execution.disable_graphs:
        return "disabled by --disable-graphs"
    if not kernels.can_be_captured:
        return f"the {kernels.name} kernels look at a step's sizes on the host"
    if isinstance(resolved.shape, ForeignConfig):
        return "transformers computes the model's layers"
    if parallel.enable_dp_attention:
        return "with --enable-dp-attention ranks agree on a step's rows on the host"
    if parallel.pp_size > 1:
        return f"{parallel.pp_size} stages exchange hidden states within a step"
    if parallel.enable_eplb:
        return "with --enable-eplb experts change places, and captured steps would not"
    if resolved.decoder.experts is not None and not kernels.captures_experts:
        return f"the {kernels.name} kernels read on the host which experts were chosen"
    return None


def graphs_decisions(resolved: Resolved) -> list[Decision]:
    """What a GPU's engine will decide about captured steps; nothing for another device."""
    if not runs_ahead(resolved.device):
        return []
    is_off = resolved.config.execution.disable_graphs
    why = why_not_captured(resolved)
    told = "a GPU captures steps" if why is None else f"steps run op by op: {why}"
    return [Decision("disable_graphs", is_off, told)]


def capture_plan(
    config: ResolvedConfig,
    decoder: DecoderConfig,
    places: CachePlaces,
    pool_sizes: Sequence[int],
) -> CapturePlan:
    """The sizes of steps that are captured.

    places      of the model's own cache groups
    pool_sizes  pages and slots of each pool; every tensor of a pool has one more than these

    Raises ConfigError for a size that no step can have."""
    execution, scheduler = config.execution, config.scheduler
    most_requests, most_tokens = scheduler.max_running_requests, most_tokens_of(config)
    largest = min(execution.cuda_graph_max_bs or LARGEST_CAPTURED_DECODE, most_requests)
    decode = decode_sizes(largest)
    if execution.cuda_graph_bs is not None:
        decode = _sizes(execution.cuda_graph_bs, "--cuda-graph-bs", most_requests)
    prefill = prefill_sizes(min(LARGEST_CAPTURED_PREFILL, most_tokens))
    if execution.piecewise_cuda_graph_tokens is not None:
        prefill = _sizes(
            execution.piecewise_cuda_graph_tokens, "--piecewise-cuda-graph-tokens", most_tokens
        )
    page_size = config.memory.page_size
    return CapturePlan(
        decode=decode,
        prefill=() if execution.disable_piecewise_cuda_graph else prefill,
        max_pages=-(-config.model.context_length // page_size),
        page_size=page_size,
        spares=places.spares(pool_sizes),
        of_groups=places.of_groups,
        group_of_layer=places.group_of_layer,
        shares_pages=places.shares_pages,
        vocab_size=decoder.vocab_size,
        dtype=DTYPES[config.model.dtype],
        device=torch.device(execution.device),
        has_adapters=config.lora.is_on,
    )


def most_tokens_of(config: ResolvedConfig) -> int:
    """The largest number of new tokens that a step computes."""
    chunk, length = config.scheduler.chunked_prefill_size, config.model.context_length
    return length if chunk == -1 else chunk


def _sizes(text: str, flag: str, largest: int) -> tuple[int, ...]:
    sizes = parse_sizes(text, flag=flag)
    if sizes[-1] > largest:
        raise ConfigError(
            f"{flag} has {sizes[-1]}, but no step is larger than {largest}; leave out what is "
            "larger, or raise "
            + ("--max-running-requests" if flag == "--cuda-graph-bs" else "--chunked-prefill-size")
        )
    return sizes


def measure_pool(
    config: ResolvedConfig,
    cache: CachePlan,
    model: Capturable,
    places: CachePlaces,
    kernels: Kernels,
    memory: DeviceMemory,
    *,
    captures: CapturePlan | None,
    wanted_tokens: int | None,
    chooses_tokens: bool,
) -> PoolSize:
    """Run the largest steps, and give the rest of the memory to the KV pool.

    places         of the model's own cache groups, of those in `cache`
    captures       the steps that will be captured; None: no steps are
    wanted_tokens  tokens that the KV pool holds; None: as many as fit
    chooses_tokens  as in run_largest_steps"""
    page_size, num_tokens = config.memory.page_size, most_tokens_of(config)
    page = allocate_caches(
        cache.groups,
        [1] * len(cache.pools),
        page_size=page_size,
        device=memory.device,
        held=cache.held,
    )
    max_pages = -(-config.model.context_length // page_size)

    def run() -> None:
        run_largest_steps(
            model,
            kernels,
            page,
            page_size=page_size,
            group_of_layer=places.group_of_layer,
            num_tokens=num_tokens,
            num_requests=config.scheduler.max_running_requests,
            max_pages=max_pages,
            chooses_tokens=chooses_tokens,
            device=memory.device,
        )

    step_bytes = memory.peak_bytes_of(run)
    graph_bytes = 0
    if captures is not None:
        share = min(1.0, captures.most_tokens / num_tokens)
        overhead_bytes = GRAPH_OVERHEAD_BYTES * (1 + captures.has_adapters)
        graph_bytes = int(step_bytes * share) + captures.logits_bytes + overhead_bytes
    free_bytes, total_bytes = memory.free_and_total()
    use = MemoryUse(
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        step_bytes=step_bytes,
        graph_bytes=graph_bytes,
    )
    # A page or slot of each pool is nobody's if steps are captured.
    spare_bytes = 0 if captures is None else sum(map(cache.unit_bytes, cache.pools))
    enough = POOL_CONTEXTS * max_pages * page_size
    return size_pool(
        use,
        pages_in=lambda num_bytes: (
            cache.most_tokens(max(num_bytes - spare_bytes, 0), enough=enough) // page_size
        ),
        bytes_of=lambda num_pages: cache.num_bytes(num_pages * page_size) + spare_bytes,
        mem_fraction_static=config.memory.mem_fraction_static,
        wanted_pages=None if wanted_tokens is None else wanted_tokens // page_size,
    )


def capture_on_device(
    model: Capturable,
    kernels: Kernels,
    kv_caches: Sequence[tuple[Tensor, ...]],
    plan: CapturePlan,
    recorder: Capture,
    memory: DeviceMemory,
    watch: LoadWatch,
    adapters: StepsWithAdapters | None = None,
) -> Recorded:
    """Capture the plan's steps, with a bar on a terminal, and log how much memory they take.

    adapters  as in capture_steps"""
    start_s, (free_before, _) = time.perf_counter(), memory.free_and_total()
    with _bar(watch) as on_progress:
        steps = capture_steps(model, kernels, kv_caches, plan, recorder, on_progress, adapters)
    taken = free_before - memory.free_and_total()[0]
    parts = [
        f"{len(sizes)} sizes of {what} up to {sizes[-1]} {unit}"
        for what, sizes, unit in (
            ("decode", plan.decode, "requests"),
            ("prefill", plan.prefill, "tokens"),
        )
        if sizes
    ]
    seconds = time.perf_counter() - start_s
    what = " and ".join(parts) + ("" if adapters is None else ", also with adapters,")
    why = f"{what} captured in {seconds:.1f} s, {taken / 2**30:.2f} GiB"
    log.info("graphs: %s", why)
    return Recorded(steps, why, steps.sampling_ops)


@contextmanager
def _bar(watch: LoadWatch) -> Iterator[captured.Progress]:
    console = Console(stderr=True)
    columns = (
        TextColumn("capturing steps"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def tell(done: int, total: int) -> None:
            watch.beat(f"capturing steps, {done} of {total}")
            progress.update(task, completed=done, total=total)

        yield tell
