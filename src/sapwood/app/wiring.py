"""Builds an engine: model files -> resolved configuration -> model, memory, executor, loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from sapwood.app.grammars import GrammarParts, build_grammars
from sapwood.app.loading import LoadWatch, fill, timed
from sapwood.app.model_defaults import checkpoint_dtype, eos_token_ids, read_json
from sapwood.app.pooling import (
    Shape,
    build_pooling_runner,
    encoder_facts,
    only_decoder,
    read_shape,
)
from sapwood.base.channel import Receiver, Sender
from sapwood.base.clock import MonotonicClock
from sapwood.base.errors import ConfigError
from sapwood.distributed.groups import Group
from sapwood.engine.instruments import Instruments
from sapwood.engine.loop import EngineLoop, StepExecutor
from sapwood.engine.scheduler import Scheduler
from sapwood.executor.graphs import choose_graph
from sapwood.executor.launch import OverlappedExecutor, SerialExecutor
from sapwood.executor.pooling_runner import PoolingRunner
from sapwood.executor.rows import RowTable
from sapwood.executor.runner import DecoderModel, Runner
from sapwood.executor.sampling.custom import CustomProcessors
from sapwood.executor.sampling.processors import (
    LogitBias,
    LogitsProcessor,
    MinNewTokens,
    Penalties,
)
from sapwood.executor.sampling.sampler import Sampler
from sapwood.executor.sampling.thinking_budget import ThinkingBudgets
from sapwood.executor.warmup import warm_up, warm_up_pooling
from sapwood.kernels.interface import DTYPES
from sapwood.kernels.platform import Platform, read_platform
from sapwood.kernels.registry import Need, Selection, select_kernels
from sapwood.layers.quantization import SCHEMES
from sapwood.memory.buffers import allocate_kv_caches
from sapwood.memory.eviction import EVICTION_POLICIES
from sapwood.memory.ledger import Ledger
from sapwood.memory.prefix_tree import PrefixTree
from sapwood.models.config import DecoderConfig
from sapwood.models.encoder.config import EncoderConfig
from sapwood.models.pooling import pooling_of
from sapwood.models.registry import ARCHITECTURES
from sapwood.models.store import ModelFiles, Progress, fetch_model
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.resolve import Decision, MachineFacts, ModelFacts, resolve
from sapwood.schema.output import EngineOutput, EngineReady
from sapwood.schema.pooling import Pooling
from sapwood.schema.request import EngineInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What will run and why.

    shape    the model's sizes
    eos      token ids that end an output
    pooling  of a model that answers with numbers; None: it generates
    """

    config: EngineConfig
    decisions: list[Decision]
    files: ModelFiles
    shape: Shape
    eos: frozenset[int]
    kernels: Selection
    pooling: Pooling | None = None

    @property
    def decoder(self) -> DecoderConfig:
        """The model's sizes; ConfigError if it is no decoder."""
        return only_decoder(self.shape, self.files.name)


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
    pooling = pooling_of(
        hf_config,
        files.path,
        is_embedding=asked.model.is_embedding,
        method=asked.model.pooling_method,
    )
    shape = read_shape(hf_config, pooling)
    is_dummy = asked.model.load_format == "dummy"
    weight_format = "dummy" if is_dummy else files.weight_format
    facts = facts_of(files, shape, checkpoint_dtype(hf_config), weight_format)
    machine = machine_facts(read_platform(), asked.execution.device)
    config, decisions = resolve(asked, machine, facts)
    shape = shape.for_context(_known(config.model.context_length))
    need = Need(
        device=torch.device(_known_text(config.execution.device)).type,
        dtype=DTYPES[config.model.dtype],
        head_dim=shape.head_dim,
        page_size=_known(config.memory.page_size),
    )
    kernels = select_kernels(need, config.execution.kernels)
    decisions.append(Decision("kernels", kernels.kernels.name, kernels.why))
    quantization = config.model.quantization
    if quantization is not None and not kernels.kernels.multiplies_quantized:
        why = f"{kernels.kernels.name} kernels dequantise: no less memory than {config.model.dtype}"
        decisions.append(Decision("quantization", quantization, why))
    if pooling is not None:
        decisions.append(Decision("pooling_method", pooling.method, pooling.why))
        model = replace(config.model, is_embedding=True, pooling_method=pooling.method)
        config = replace(config, model=model)
    return Resolved(
        config=config,
        decisions=decisions,
        files=files,
        shape=shape,
        eos=eos_token_ids(files.path),
        kernels=kernels,
        pooling=pooling,
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


def machine_facts(platform: Platform, asked_device: str | None) -> MachineFacts:
    """The facts of that device; of the best one if none was asked for."""
    name = asked_device or platform.device
    device = _device(name)
    free, total = (
        torch.cuda.mem_get_info(device)
        if device.type == "cuda"
        else (min(psutil.virtual_memory().available, platform.memory_bytes), platform.memory_bytes)
    )
    return MachineFacts(
        device=name,
        memory_bytes=total,
        available_bytes=free,
        num_cores=platform.num_cores,
        fast_bfloat16=not platform.cpu_flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"}),
    )


def _device(name: str) -> torch.device:
    """ConfigError if there is no such device here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device is {name!r}, which is no device: {error}") from error
    if device.type == "cuda":
        num_devices = torch.cuda.device_count()
        if (device.index or 0) >= num_devices:
            raise ConfigError(
                f"--device is {name} but this machine has {num_devices} CUDA devices; use "
                "--device cpu, or leave it out"
            )
    return device


def facts_of(files: ModelFiles, shape: Shape, dtype: str, weight_format: str) -> ModelFacts:
    match shape:
        case EncoderConfig():
            return encoder_facts(files, shape, dtype, weight_format)
        case DecoderConfig():
            return model_facts(files, shape, dtype, weight_format)


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
    resolved: Resolved,
    receiver: Receiver[EngineInput],
    sender: Sender[EngineOutput],
    *,
    instruments: Instruments | None = None,
    watch: LoadWatch | None = None,
) -> Engine:
    """Load the model and connect all parts of an engine on this rank.

    instruments  what watches the loop; watch: what watches loading
    """
    watch = watch or LoadWatch()
    config = resolved.config
    if _known_text(config.execution.device) == "cpu":
        torch.set_num_threads(_known(config.execution.num_threads))
    runner: Runner | PoolingRunner
    clock = MonotonicClock()
    grammars = None
    if resolved.pooling is None:
        grammars = build_grammars(
            config,
            resolved.files.path,
            vocab_size=resolved.shape.vocab_size,
            eos_token_ids=resolved.eos,
            clock=clock,
        )
        runner, warm = _build_runner(resolved, watch, grammars), warm_up
    else:
        runner = build_pooling_runner(
            config,
            resolved.files,
            resolved.shape,
            resolved.pooling,
            resolved.kernels.kernels,
            watch,
        )
        warm = warm_up_pooling
    ledger = _build_ledger(config)
    scheduler = Scheduler(
        config.scheduler,
        ledger,
        context_length=_known(config.model.context_length),
        vocab_size=resolved.shape.vocab_size,
        eos_token_ids=resolved.eos,
        clock=clock,
        pooling=resolved.pooling,
        grammars=None if grammars is None else grammars.compiler,
    )
    if not config.execution.skip_server_warmup:
        watch.beat("warming up")
        with timed("warm-up"):
            warm(runner.execute)
    depth = _known(config.scheduler.overlap_depth)
    executor = SerialExecutor(runner.execute) if depth == 1 else OverlappedExecutor(runner.execute)
    step_executor: StepExecutor = executor
    loop = EngineLoop(
        scheduler,
        step_executor,
        receiver,
        sender,
        depth=depth,
        clock=clock,
        instruments=instruments,
    )
    ready = EngineReady(
        context_length=_known(config.model.context_length),
        max_total_tokens=_known(config.memory.max_total_tokens),
        page_size=ledger.page_size,
        notes=[str(decision) for decision in resolved.decisions],
        options=config.flat(),
        max_running_requests=_known(config.scheduler.max_running_requests),
        load_s=watch.load_s,
        weight_bytes=watch.weight_bytes,
        page_bytes=watch.page_bytes,
    )
    return Engine(loop=loop, ready=ready, scheduler=scheduler, executor=executor)


def _build_runner(
    resolved: Resolved, watch: LoadWatch, grammars: GrammarParts | None = None
) -> Runner:
    config, decoder = resolved.config, resolved.decoder
    device = torch.device(_known_text(config.execution.device))
    dtype = DTYPES[config.model.dtype]
    page_size = _known(config.memory.page_size)
    num_pages = _known(config.memory.max_total_tokens) // page_size
    model = load_model(resolved, device=device, dtype=dtype, watch=watch)
    watch.beat("allocating the KV pool")
    with timed("KV pool"):
        kv_caches = allocate_kv_caches(
            num_layers=decoder.num_layers,
            num_pages=num_pages,
            num_kv_heads=decoder.num_kv_heads,
            page_size=page_size,
            head_dim=decoder.head_dim,
            dtype=dtype,
            device=device,
        )
    watch.take_kv(kv_caches)
    max_pages = -(-_known(config.model.context_length) // page_size)
    rows = RowTable(
        num_rows=_known(config.scheduler.max_running_requests), max_pages=max_pages, device=device
    )
    failures: dict[int, str] = {}
    processors: list[LogitsProcessor] = [
        LogitBias(device),
        Penalties(device),
        MinNewTokens(resolved.eos, device),
        CustomProcessors(failures, allow_code=config.execution.enable_custom_logit_processor),
        ThinkingBudgets(),
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
        sampler=Sampler(
            rows,
            processors,
            kernels,
            failures,
            None if grammars is None else grammars.masks(kernels, failures),
        ),
        page_size=page_size,
        device=device,
    )


def load_model(
    resolved: Resolved,
    *,
    device: torch.device,
    dtype: torch.dtype,
    watch: LoadWatch | None = None,
) -> DecoderModel:
    """The model with its weights, packed for the kernels; the log says how long each step took."""
    config, files = resolved.config, resolved.files
    with timed("model structure"):
        build = ARCHITECTURES.get(resolved.decoder.architecture)
        scheme = SCHEMES.get(config.model.quantization or "none")()
        model = build(resolved.decoder, resolved.kernels.kernels, Group(), device, dtype, scheme)
    fill(model, files, config, dtype, watch=watch)
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
