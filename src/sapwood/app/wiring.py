"""Builds an engine: model files -> resolved configuration -> model, memory, executor, loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sapwood.app.gpu import capture_graph, capture_plan, measure_pool
from sapwood.app.grammars import GrammarParts, build_grammars
from sapwood.app.loading import (
    LoadWatch,
    checkpoint_format,
    dense_weight_dtype,
    fill,
    linear_scheme,
    refuse_absurd_size,
    timed,
)
from sapwood.app.model_defaults import (
    checkpoint_dtype,
    eos_token_ids,
    read_json,
    reading,
    refuse_foreign_code,
)
from sapwood.app.pooling import (
    Shape,
    build_pooling_runner,
    encoder_facts,
    only_decoder,
    read_shape,
)
from sapwood.base.channel import Receiver, Sender
from sapwood.base.clock import MonotonicClock
from sapwood.distributed.groups import Group
from sapwood.engine.instruments import Instruments
from sapwood.engine.loop import EngineLoop, StepExecutor
from sapwood.engine.scheduler import Scheduler
from sapwood.executor.captured import CapturePlan
from sapwood.executor.grammar.compiler import GrammarCompiler
from sapwood.executor.graphs import GraphChoice, choose_graph
from sapwood.executor.launch import (
    Execute,
    Launch,
    OverlappedExecutor,
    QueuedExecutor,
    SerialExecutor,
)
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
from sapwood.kernels.capture import capture_on
from sapwood.kernels.cpu import fast_bfloat16, slower_because
from sapwood.kernels.interface import DTYPES, KV_CACHE_DTYPES
from sapwood.kernels.platform import (
    CudaMemory,
    Platform,
    device_memory,
    find_device,
    read_platform,
)
from sapwood.kernels.registry import Need, Selection, select_kernels
from sapwood.kernels.transfer import runs_ahead
from sapwood.memory.buffers import allocate_kv_caches
from sapwood.memory.eviction import EVICTION_POLICIES
from sapwood.memory.ledger import Ledger
from sapwood.memory.prefix_tree import PrefixTree
from sapwood.models.config import DecoderConfig
from sapwood.models.encoder.config import EncoderConfig
from sapwood.models.pooling import ENCODERS, pooling_of
from sapwood.models.registry import ARCHITECTURES
from sapwood.models.store import ModelFiles, Progress, fetch_model
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.resolve import (
    CheckpointFacts,
    Decision,
    MachineFacts,
    ModelFacts,
    resolve,
)
from sapwood.schema.output import EngineOutput, EngineReady
from sapwood.schema.pooling import Pooling
from sapwood.schema.request import EngineInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The resolved configuration, with everything that was found out on the way.

    shape    the model's sizes
    eos      token ids that end an output
    pooling  how the model makes embeddings or scores; None: the model generates
    wanted_tokens  size of the KV pool in tokens, if the options say it; None: they do not
    """

    config: EngineConfig
    decisions: list[Decision]
    files: ModelFiles
    shape: Shape
    eos: frozenset[int]
    kernels: Selection
    pooling: Pooling | None = None
    wanted_tokens: int | None = None

    @property
    def decoder(self) -> DecoderConfig:
        """The model's sizes; ConfigError if it is no decoder."""
        return only_decoder(self.shape, self.files.name)


Executor = SerialExecutor | OverlappedExecutor | QueuedExecutor


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An engine. `loop.run()` serves until it is drained or fails; close the engine in any case."""

    loop: EngineLoop
    ready: EngineReady
    scheduler: Scheduler
    executor: Executor
    grammars: GrammarCompiler | None = None

    def close(self) -> None:
        """Wait for the engine's own threads. May be called twice.

        After a failed step the next one may still run. The interpreter must not end before it: a
        thread that returned from native code later would crash the process."""
        self.executor.close()
        if self.grammars is not None:
            self.grammars.close()


def resolve_config(
    asked: EngineConfig, *, home: Path, progress: Progress | None = None, is_verified: bool = False
) -> Resolved:
    """Find the model and make every open choice. StartupError if that is impossible.

    is_verified  whether the files have been compared with their checksums already, if they must be
    """
    files = fetch_files(asked, home=home, progress=progress, is_verified=is_verified)
    hf_config = read_json(files.path / "config.json")
    with reading(files.path / "config.json"):
        refuse_foreign_code(hf_config, {*ARCHITECTURES.names(), *ENCODERS})
        pooling = pooling_of(
            hf_config,
            files.path,
            is_embedding=asked.model.is_embedding,
            method=asked.model.pooling_method,
        )
        shape = read_shape(hf_config, pooling)
        dtype = checkpoint_dtype(hf_config)
        if isinstance(shape, DecoderConfig):
            ARCHITECTURES.get(shape.architecture)  # refuses an unknown architecture
    is_dummy = asked.model.load_format == "dummy"
    if not is_dummy:
        refuse_absurd_size(files, shape.num_parameters)
    weight_format = "dummy" if is_dummy else files.weight_format
    facts = facts_of(files, shape, dtype, weight_format)
    form = checkpoint_format(files)
    if form is not None:
        found = CheckpointFacts(form.name, form.summary, form.weight_bytes)
        facts = replace(facts, quantized=found)
    platform = read_platform()
    machine = machine_facts(platform, asked.execution.device, asked.execution.kernels)
    config, decisions = resolve(asked, machine, facts)
    shape = shape.for_context(_known(config.model.context_length))
    need = Need(
        device=torch.device(_known_text(config.execution.device)).type,
        dtype=DTYPES[config.model.dtype],
        head_dim=shape.head_dim,
        page_size=_known(config.memory.page_size),
        kv_dtype=KV_CACHE_DTYPES[config.memory.kv_cache_dtype],
    )
    kernels = select_kernels(need, config.execution.kernels)
    why = explain_kernels(kernels, slower_because(platform, config.execution.kernels))
    decisions.append(Decision("kernels", kernels.kernels.name, why))
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
        eos=eos_token_ids(files.path, vocab_size=shape.vocab_size),
        kernels=kernels,
        pooling=pooling,
        wanted_tokens=None
        if asked.memory.max_total_tokens is None
        else config.memory.max_total_tokens,
    )


def fetch_files(
    asked: EngineConfig, *, home: Path, progress: Progress | None = None, is_verified: bool = False
) -> ModelFiles:
    return fetch_model(
        asked.model.model,
        home=home,
        revision=asked.model.revision,
        load_format=asked.model.load_format,
        offline=asked.model.offline,
        checksum=None if is_verified else asked.model.model_checksum,
        progress=progress,
    )


def explain_kernels(selection: Selection, slower: str | None) -> str:
    """Why these kernels, with which instructions, and why they are slower than they could be."""
    kernels = selection.kernels
    why = f"{selection.why}, with {kernels.isa} instructions" if kernels.isa else selection.why
    return f"{why}; {slower}" if slower is not None and kernels.name == "cpu" else why


def machine_facts(
    platform: Platform, asked_device: str | None, asked_kernels: str | None = None
) -> MachineFacts:
    """The facts of the device that the options name, or else of the best device, for the kernels
    that they name."""
    device = find_device(asked_device, platform)
    free, total = device_memory(device, platform)
    return MachineFacts(
        device=str(device),
        memory_bytes=total,
        available_bytes=free,
        num_cores=platform.num_cores,
        fast_bfloat16=fast_bfloat16(platform, asked_kernels),
    )


def facts_of(files: ModelFiles, shape: Shape, dtype: str, weight_format: str) -> ModelFacts:
    match shape:
        case EncoderConfig():
            return encoder_facts(files, shape, dtype, weight_format)
        case DecoderConfig():
            return model_facts(files, shape, dtype, weight_format)


def model_facts(
    files: ModelFiles, decoder: DecoderConfig, dtype: str, weight_format: str
) -> ModelFacts:
    longest = max(decoder.rope.max_context_length, decoder.context_length)
    return ModelFacts(
        name=files.name,
        context_length=decoder.context_length,
        max_context_length=longest,
        dtype=dtype,
        num_parameters=decoder.num_parameters,
        num_embedding_parameters=decoder.vocab_size * decoder.hidden_size,
        weight_format=weight_format,
        cache=replace(decoder, context_length=longest).cache_groups,
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

    instruments  observe the loop
    watch        follows the loading of weights
    """
    watch = watch or LoadWatch()
    config = resolved.config
    if _known_text(config.execution.device) == "cpu":
        torch.set_num_threads(_known(config.execution.num_threads))
    runner: Runner | PoolingRunner
    launch: Launch | None = None
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
        decoder = _build_runner(resolved, watch, grammars)
        runner, resolved, warm = decoder.runner, decoder.resolved, warm_up
        config = resolved.config
        if runs_ahead(torch.device(_known_text(config.execution.device))):
            launch = decoder.runner.launch
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
        hidden_size=resolved.shape.hidden_size,
        grammars=None if grammars is None else grammars.compiler,
    )
    if not config.execution.skip_server_warmup:
        watch.beat("warming up")
        with timed("warm-up"):
            warm(runner.execute)
    depth = _known(config.scheduler.overlap_depth)
    executor = _executor(runner.execute, launch, depth)
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
    return Engine(
        loop=loop,
        ready=ready,
        scheduler=scheduler,
        executor=executor,
        grammars=None if grammars is None else grammars.compiler,
    )


def _executor(execute: Execute, launch: Launch | None, depth: int) -> Executor:
    """The executor for this device and depth.

    launch  queues a step on a device with a queue; None: the device or the runner has none
    """
    if depth == 1:
        return SerialExecutor(execute)
    return OverlappedExecutor(execute) if launch is None else QueuedExecutor(launch)


@dataclass(frozen=True, slots=True)
class _Decoder:
    """A runner, and the configuration with the size of its KV pool."""

    runner: Runner
    resolved: Resolved


def _build_runner(
    resolved: Resolved, watch: LoadWatch, grammars: GrammarParts | None = None
) -> _Decoder:
    decoder, kernels = resolved.decoder, resolved.kernels.kernels
    device = torch.device(_known_text(resolved.config.execution.device))
    dtype = DTYPES[resolved.config.model.dtype]
    model = load_model(resolved, device=device, dtype=dtype, watch=watch)
    captures = None
    if runs_ahead(device):
        captures = _captures(resolved)
        watch.beat("measuring the largest step")
        resolved = _with_measured_pool(resolved, model, captures)
    config = resolved.config
    page_size = _known(config.memory.page_size)
    num_pages = _known(config.memory.max_total_tokens) // page_size
    watch.beat("allocating the KV pool")
    with timed("KV pool"):
        kv_caches = allocate_kv_caches(
            num_layers=decoder.num_layers,
            num_pages=num_pages if captures is None else num_pages + 1,
            num_kv_heads=decoder.num_kv_heads,
            page_size=page_size,
            head_dim=decoder.head_dim,
            dtype=KV_CACHE_DTYPES[config.memory.kv_cache_dtype],
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
        Penalties(device, kernels),
        MinNewTokens(resolved.eos, device),
        CustomProcessors(failures, allow_code=config.execution.enable_custom_logit_processor),
        ThinkingBudgets(),
    ]

    def capture() -> GraphChoice:
        plan = capture_plan(config, decoder, spare_page=num_pages)
        recorder, memory = capture_on(device), CudaMemory(device)
        return capture_graph(model, kernels, kv_caches, plan, recorder, memory, watch)

    choice = choose_graph(
        model,
        kernels,
        kv_caches,
        enabled=not config.execution.disable_graphs,
        capture=None if captures is None else capture,
    )
    resolved.decisions.append(Decision("graphs", "on" if choice.is_recorded else "off", choice.why))
    if device.type == "cpu":
        kernels.set_num_threads(_known(config.execution.num_threads))
    runner = Runner(
        model,
        choice.graph,
        kv_caches=kv_caches,
        rows=rows,
        sampler=Sampler(
            rows,
            processors,
            choice.sampling_ops or kernels,
            failures,
            None if grammars is None else grammars.masks(kernels, failures),
        ),
        page_size=page_size,
        device=device,
    )
    return _Decoder(runner, resolved)


def _captures(resolved: Resolved) -> CapturePlan | None:
    """The steps that a GPU will capture; None: no steps."""
    if resolved.config.execution.disable_graphs or not resolved.kernels.kernels.can_be_captured:
        return None
    return capture_plan(resolved.config, resolved.decoder, spare_page=0)


def _with_measured_pool(
    resolved: Resolved, model: DecoderModel, captures: CapturePlan | None
) -> Resolved:
    """The configuration with a KV pool of measured size, instead of the estimated one."""
    config = resolved.config
    with timed("measuring the largest step"):
        pool = measure_pool(
            config,
            resolved.decoder,
            model,
            resolved.kernels.kernels,
            CudaMemory(torch.device(_known_text(config.execution.device))),
            captures=captures,
            wanted_tokens=resolved.wanted_tokens,
        )
    num_tokens = pool.num_pages * _known(config.memory.page_size)
    memory = replace(config.memory, max_total_tokens=num_tokens)
    kept = [decision for decision in resolved.decisions if decision.option != "max_total_tokens"]
    kept.append(Decision("max_total_tokens", num_tokens, pool.why))
    return replace(resolved, config=replace(config, memory=memory), decisions=kept)


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
        scheme = linear_scheme(config, files)
        kernels, embedding_dtype = resolved.kernels.kernels, dense_weight_dtype(config)
        model = build(resolved.decoder, kernels, Group(), device, dtype, scheme, embedding_dtype)
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
