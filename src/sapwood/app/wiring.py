"""Builds an engine: model files -> resolved configuration -> model, memory, executor, loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from sapwood.app.model_defaults import checkpoint_dtype, eos_token_ids, read_json
from sapwood.base.channel import Receiver, Sender
from sapwood.base.clock import MonotonicClock
from sapwood.distributed.groups import Group
from sapwood.engine.loop import EngineLoop, StepExecutor
from sapwood.engine.scheduler import Scheduler
from sapwood.executor.graphs import choose_graph
from sapwood.executor.launch import OverlappedExecutor, SerialExecutor
from sapwood.executor.rows import RowTable
from sapwood.executor.runner import DecoderModel, Runner
from sapwood.executor.sampling.processors import (
    LogitBias,
    LogitsProcessor,
    MinNewTokens,
    Penalties,
)
from sapwood.executor.sampling.sampler import Sampler
from sapwood.executor.warmup import warm_up
from sapwood.kernels.interface import DTYPES
from sapwood.kernels.platform import Platform, read_platform
from sapwood.kernels.registry import Need, Selection, select_kernels
from sapwood.layers.quantization import SCHEMES
from sapwood.memory.buffers import allocate_kv_caches
from sapwood.memory.eviction import EVICTION_POLICIES
from sapwood.memory.ledger import Ledger
from sapwood.memory.prefix_tree import PrefixTree
from sapwood.models.config import DecoderConfig
from sapwood.models.loader.assign import load_weights
from sapwood.models.loader.dummy import random_weights
from sapwood.models.loader.weights import iterate_blocks, iterate_weights
from sapwood.models.registry import ARCHITECTURES
from sapwood.models.store import ModelFiles, Progress, fetch_model
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.resolve import Decision, MachineFacts, ModelFacts, resolve
from sapwood.schema.output import EngineOutput, EngineReady
from sapwood.schema.request import EngineInput

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What will run and why.

    decoder  the model's shape
    eos      token ids that end an output
    """

    config: EngineConfig
    decisions: list[Decision]
    files: ModelFiles
    decoder: DecoderConfig
    eos: frozenset[int]
    kernels: Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One engine, built; `loop.run()` serves until it is drained."""

    loop: EngineLoop
    ready: EngineReady
    scheduler: Scheduler
    executor: SerialExecutor | OverlappedExecutor


def resolve_config(
    asked: EngineConfig, *, home: Path, progress: Progress | None = None
) -> Resolved:
    """Find the model and decide everything that was left open. StartupError if it cannot be."""
    files = fetch_files(asked, home=home, progress=progress)
    hf_config = read_json(files.path / "config.json")
    decoder = DecoderConfig.from_hf(hf_config)
    is_dummy = asked.model.load_format == "dummy"
    weight_format = "dummy" if is_dummy else files.weight_format
    facts = model_facts(files, decoder, checkpoint_dtype(hf_config), weight_format)
    config, decisions = resolve(asked, machine_facts(read_platform()), facts)
    decoder = decoder.for_context(_known(config.model.context_length))
    need = Need(
        device=torch.device(_known_text(config.execution.device)).type,
        dtype=DTYPES[config.model.dtype],
        head_dim=decoder.head_dim,
        page_size=_known(config.memory.page_size),
    )
    kernels = select_kernels(need, config.execution.kernels)
    decisions.append(Decision("kernels", kernels.kernels.name, kernels.why))
    return Resolved(
        config=config,
        decisions=decisions,
        files=files,
        decoder=decoder,
        eos=eos_token_ids(files.path),
        kernels=kernels,
    )


def fetch_files(asked: EngineConfig, *, home: Path, progress: Progress | None = None) -> ModelFiles:
    return fetch_model(
        asked.model.model,
        home=home,
        revision=asked.model.revision,
        load_format=asked.model.load_format,
        offline=asked.model.offline,
        progress=progress,
    )


def machine_facts(platform: Platform) -> MachineFacts:
    on_cpu = platform.device == "cpu"
    free, total = (
        (min(psutil.virtual_memory().available, platform.memory_bytes), platform.memory_bytes)
        if on_cpu
        else torch.cuda.mem_get_info()
    )
    return MachineFacts(
        device=platform.device,
        memory_bytes=total,
        available_bytes=free,
        num_cores=platform.num_cores,
        fast_bfloat16=not platform.cpu_flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"}),
    )


def model_facts(
    files: ModelFiles, decoder: DecoderConfig, dtype: str, weight_format: str
) -> ModelFacts:
    return ModelFacts(
        name=files.name,
        context_length=decoder.default_context_length,
        max_context_length=max(decoder.rope.max_context_length, decoder.default_context_length),
        dtype=dtype,
        num_parameters=decoder.num_parameters,
        num_embedding_parameters=decoder.vocab_size * decoder.hidden_size,
        weight_format=weight_format,
        kv_values_per_token=2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim,
    )


def build_engine(
    resolved: Resolved, receiver: Receiver[EngineInput], sender: Sender[EngineOutput]
) -> Engine:
    """Load the model and connect all parts of an engine on this rank."""
    config = resolved.config
    if _known_text(config.execution.device) == "cpu":
        torch.set_num_threads(_known(config.execution.num_threads))
    runner = _build_runner(resolved)
    ledger = _build_ledger(config)
    clock = MonotonicClock()
    scheduler = Scheduler(
        config.scheduler,
        ledger,
        context_length=_known(config.model.context_length),
        vocab_size=resolved.decoder.vocab_size,
        eos_token_ids=resolved.eos,
        clock=clock,
    )
    if not config.execution.skip_server_warmup:
        with _timed("warm-up"):
            warm_up(runner.execute)
    depth = _known(config.scheduler.overlap_depth)
    executor = SerialExecutor(runner.execute) if depth == 1 else OverlappedExecutor(runner.execute)
    step_executor: StepExecutor = executor
    loop = EngineLoop(scheduler, step_executor, receiver, sender, depth=depth, clock=clock)
    ready = EngineReady(
        context_length=_known(config.model.context_length),
        max_total_tokens=_known(config.memory.max_total_tokens),
        page_size=ledger.page_size,
        notes=[str(decision) for decision in resolved.decisions],
    )
    return Engine(loop=loop, ready=ready, scheduler=scheduler, executor=executor)


def _build_runner(resolved: Resolved) -> Runner:
    config, decoder = resolved.config, resolved.decoder
    device = torch.device(_known_text(config.execution.device))
    dtype = DTYPES[config.model.dtype]
    page_size = _known(config.memory.page_size)
    num_pages = _known(config.memory.max_total_tokens) // page_size
    model = load_model(resolved, device=device, dtype=dtype)
    with _timed("KV pool"):
        kv_caches = allocate_kv_caches(
            num_layers=decoder.num_layers,
            num_pages=num_pages,
            num_kv_heads=decoder.num_kv_heads,
            page_size=page_size,
            head_dim=decoder.head_dim,
            dtype=dtype,
            device=device,
        )
    max_pages = -(-_known(config.model.context_length) // page_size)
    rows = RowTable(
        num_rows=_known(config.scheduler.max_running_requests), max_pages=max_pages, device=device
    )
    processors: list[LogitsProcessor] = [
        LogitBias(device),
        Penalties(decoder.vocab_size, device),
        MinNewTokens(resolved.eos, device),
    ]
    kernels = resolved.kernels.kernels
    enabled = not config.execution.disable_graphs
    choice = choose_graph(model, kernels, kv_caches, enabled=enabled)
    resolved.decisions.append(Decision("graphs", "on" if choice.is_recorded else "off", choice.why))
    if device.type == "cpu":
        kernels.set_num_threads(_known(config.execution.num_threads))
    return Runner(
        model,
        choice.graph,
        kv_caches=kv_caches,
        rows=rows,
        sampler=Sampler(rows, processors, kernels),
        page_size=page_size,
        device=device,
    )


def load_model(resolved: Resolved, *, device: torch.device, dtype: torch.dtype) -> DecoderModel:
    """The model with its weights, packed for the kernels; the log says how long each step took."""
    config, files = resolved.config, resolved.files
    with _timed("model structure"):
        build = ARCHITECTURES.get(resolved.decoder.architecture)
        scheme = SCHEMES.get(config.model.quantization or "none")()
        model = build(resolved.decoder, resolved.kernels.kernels, Group(), device, dtype, scheme)
    if config.model.load_format == "dummy":
        seed = config.scheduler.random_seed
        with _timed("random weights"):
            load_weights(model, random_weights(model.targets(), seed=seed, dtype=dtype))
    else:
        with _timed(f"weights ({files.weight_format})"):
            iterate = iterate_blocks if config.model.quantization == "gguf" else iterate_weights
            load_weights(model, iterate(files, load_format=config.model.load_format, dtype=dtype))
    with _timed("packing weights"):
        model.finalize()
    return model


def _build_ledger(config: EngineConfig) -> Ledger:
    page_size = _known(config.memory.page_size)
    tree = None
    if not config.memory.disable_radix_cache:
        tree = PrefixTree(page_size, EVICTION_POLICIES[config.memory.radix_eviction_policy])
    num_pages = _known(config.memory.max_total_tokens) // page_size
    return Ledger(num_pages=num_pages, page_size=page_size, tree=tree)


def _known(value: int | None) -> int:
    assert value is not None, "the configuration was not resolved"
    return value


def _known_text(value: str | None) -> str:
    assert value is not None, "the configuration was not resolved"
    return value


@contextmanager
def _timed(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    log.info("loading: %s took %.2f s", what, time.perf_counter() - start)
