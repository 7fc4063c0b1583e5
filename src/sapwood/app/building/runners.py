"""Builds what runs a model's steps on this rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sapwood.app.building.adapters import AdapterParts, build_adapters, steps_with_adapters
from sapwood.app.building.gpu import capture_on_device, capture_plan, measure_pool, why_not_captured
from sapwood.app.building.grammars import GrammarParts
from sapwood.app.building.handover import landing_copies, page_memory
from sapwood.app.building.loaded_models import Models, build_of, load_models
from sapwood.app.building.loading import LoadWatch, fill, timed
from sapwood.app.building.resolving import Resolved
from sapwood.app.building.tiers import page_copies
from sapwood.app.building.towers import load_tower
from sapwood.app.building.weights import ServedWeights
from sapwood.app.ranks.expert_moves import ExpertMoves
from sapwood.app.ranks.expert_parts import expert_record
from sapwood.app.ranks.member import ALONE, RankMember
from sapwood.executor.cache_inputs import CachePlaces
from sapwood.executor.captured_memory import CapturePlan
from sapwood.executor.drafting import DraftMemory
from sapwood.executor.expert_record import ExpertRecord
from sapwood.executor.grammar.ahead import GrammarsAhead
from sapwood.executor.grammar.masks import GrammarMasks
from sapwood.executor.joint import jointly
from sapwood.executor.launch import Execute, Finished, Launch
from sapwood.executor.page_copies import PageCopies, PageMemory, awaited
from sapwood.executor.per_token import RoutedExperts
from sapwood.executor.pooling_runner import PoolingModel, PoolingRunner
from sapwood.executor.recorded import Recorded, record_steps
from sapwood.executor.rows import RowTable
from sapwood.executor.runner import DecoderModel, Runner
from sapwood.executor.sampling.acceptance import AcceptThresholds
from sapwood.executor.sampling.custom import CustomProcessors
from sapwood.executor.sampling.following import FollowingOps
from sapwood.executor.sampling.guess_sampler import GuessSampler
from sapwood.executor.sampling.processors import (
    AllowedTokens,
    LogitBias,
    LogitsProcessor,
    MinNewTokens,
    Penalties,
)
from sapwood.executor.sampling.sampler import Sampler, SamplingOps
from sapwood.executor.sampling.speech import SpeechTokens
from sapwood.executor.sampling.thinking_budget import ThinkingBudgets
from sapwood.executor.sight import Sight
from sapwood.executor.stage_runner import StageRunner
from sapwood.executor.warmup import measure_steps, warm_up, warm_up_pooling
from sapwood.kernels.accelerators import capture_on, memory_of
from sapwood.kernels.transfer import runs_ahead
from sapwood.layers.adapters import AdapterContext
from sapwood.layers.build import Build
from sapwood.layers.expert_slots import MovableExperts
from sapwood.layers.pooling import Pooler
from sapwood.layers.routes import RouteLog
from sapwood.lora.adapter import adaptable
from sapwood.memory.buffers import allocate_caches
from sapwood.models.encoder.bert import Encoder
from sapwood.models.encoder.config import EncoderConfig
from sapwood.models.encoder.decoder import PooledDecoder
from sapwood.models.encoder.heads import decoder_head
from sapwood.models.foreign.structure import ForeignConfig
from sapwood.models.lm.decoder import Decoder
from sapwood.models.registry import encoder_class
from sapwood.models.vision.interface import Tower
from sapwood.schema.cache import CacheKind, shifted
from sapwood.schema.config.decision import Decision
from sapwood.schema.env import environment, home
from sapwood.schema.pooling import Pooling
from sapwood.store import open_store


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRunner:
    """What runs the steps of one model on this rank.

    resolved  the configuration, with the size that the KV pool really has
    execute   computes a step
    launch    queues a step on a device with a queue; None: the device or the runner has none
    warm_up   computes steps whose results nobody reads
    measure   seconds of a step of one request, by its new tokens, for some numbers of these; None:
              the model's requests have no tokens to guess
    adapters  loads LoRA adapters; None: there are none
    expert_record  records which experts are chosen; None: nobody can ask for that
    memory    carries out orders about weights and memory; None: it cannot be asked to
    tower     sees for the model; None: it takes only text
    copies    has the host's memory of pages; None: there is none
    pages     the pools' memory, for whoever sends pages to other engines; None: nobody does
    """

    resolved: Resolved
    execute: Execute
    launch: Launch | None
    warm_up: Callable[[Execute], None]
    measure: Callable[[Execute, Sequence[int]], dict[int, float]] | None = None
    adapters: AdapterParts | None = None
    expert_record: ExpertRecord | None = None
    memory: ServedWeights | None = None
    tower: Tower | None = None
    copies: PageCopies | None = None
    pages: PageMemory | None = None


def build_runner(
    resolved: Resolved,
    watch: LoadWatch,
    grammars: GrammarParts | None = None,
    member: RankMember = ALONE,
) -> StepRunner:
    """Load this rank's part of the model and build its runner.

    grammars  enforces grammars; None: no request has one, or another rank chooses the tokens
    """
    if resolved.device.type != "cpu" and resolved.config.execution.enable_deterministic_inference:
        resolved.kernels.kernels.set_exact_products(True)
    if resolved.pooling is not None:
        pools, tower = _pooling_execute(resolved, resolved.pooling, watch, member)
        return StepRunner(
            resolved=resolved,
            execute=pools,
            launch=None,
            tower=tower,
            warm_up=partial(
                warm_up_pooling, num_windows=_num_windows(resolved), slot=_first_slot(resolved)
            ),
        )
    record = expert_record(resolved)
    tells_routes = resolved.config.execution.enable_return_routed_experts or record is not None
    routes = RouteLog() if tells_routes else None
    lora = resolved.config.lora
    context = AdapterContext() if lora.is_on else None
    experts = MovableExperts(counts=resolved.config.parallel.enable_eplb)
    models = load_models(
        resolved, watch=watch, routes=routes, adapters=context, experts=experts, member=member
    )
    model = models.model
    adapters = None
    if context is not None and isinstance(model, Decoder):
        places = adaptable(
            model.adapter_targets(),
            model.checkpoint_name,
            resolved.dtype,
            is_elsewhere=model.is_elsewhere,
        )
        store = open_store(home(environment()))
        find = partial(store.adapter, offline=resolved.config.model.offline)
        adapters, decision = build_adapters(lora, places, context, resolved.device, find)
        resolved.decisions.append(decision)
    captures: CapturePlan | None = None
    why_not = ""
    if runs_ahead(resolved.device):
        why_not = _why_not_captured(resolved, experts)
        captures = None if why_not else _capture_plan(resolved)
        watch.beat("measuring the largest step")
        # Kept while the rest is measured: slots will have as much.
        reserve = torch.empty(
            0 if adapters is None else adapters.slots.max_bytes,
            dtype=torch.uint8,
            device=resolved.device,
        )
        resolved = member.agreed(_with_measured_pool(resolved, model, captures))
        del reserve
    execute: Execute
    launch: Launch | None = None
    memory: ServedWeights | None = None
    caches = _kv_caches(resolved, watch, num_spare=0 if captures is None else 1)
    renewing: Runner | StageRunner
    recording = Recording(captures, why_not)
    if isinstance(model, Decoder) and not resolved.stage.is_last:
        renewing = _stage_runner(resolved, model, caches, adapters)
        execute = renewing.execute
    else:
        told = None if routes is None else RoutedExperts.of(resolved.decoder, routes, record)
        renewing = runner = _decoder_runner(
            resolved, models, recording, watch, caches, grammars, told, adapters, member
        )
        execute, launch = runner.execute, runner.launch if runs_ahead(resolved.device) else None
    # Engines that share feed-forwards, and experts that move, have no one moment for an update.
    if member.counting is None and not experts.counts and isinstance(model, Decoder):
        fillable = models.fillable
        if fillable is not None:
            memory = ServedWeights(
                resolved, model, fillable, renewing, recording.captures, member.rank
            )
    if member.counting is not None and isinstance(model, Decoder):
        execute = jointly(execute, model, lambda result: result)
        launch = None if launch is None else jointly(launch, model, Finished)
    if experts.counts and isinstance(model, Decoder):
        moves = ExpertMoves(model, experts, resolved, member.tp)
        execute = moves.before(execute)
        launch = None if launch is None else moves.before(launch)
    arriving = renewing.kv_caches
    copies = page_copies(resolved, caches, arriving, watch)
    if copies is None:
        copies = landing_copies(resolved, caches, arriving, watch)
    if copies is not None:
        execute = copies.before(execute)
        launch = None if launch is None else copies.before(launch)
    return StepRunner(
        resolved=resolved,
        execute=execute,
        launch=launch,
        warm_up=partial(warm_up, num_windows=_num_windows(resolved), slot=_first_slot(resolved)),
        measure=partial(
            measure_steps,
            page_size=resolved.config.memory.page_size,
            num_windows=_num_windows(resolved),
            slot=_first_slot(resolved),
        ),
        adapters=adapters,
        expert_record=record,
        memory=memory,
        tower=models.tower,
        copies=copies,
        pages=page_memory(resolved, caches),
    )


# ---- the parts of any runner ---------------------------------------------------------------------


def _kv_caches(
    resolved: Resolved, watch: LoadWatch, *, num_spare: int = 0
) -> list[tuple[Tensor, ...]]:
    """The caches of all layers, with spare pages that no request gets; none for an encoder."""
    watch.beat("allocating the KV pool")
    with timed("KV pool"):
        return allocate_caches(
            resolved.cache.groups,
            [size + num_spare for size in resolved.pool_sizes],
            page_size=resolved.config.memory.page_size,
            device=resolved.device,
            held=resolved.held,
        )


def _places(resolved: Resolved) -> CachePlaces:
    """Of the model's own cache groups."""
    return CachePlaces(
        resolved.model_groups, resolved.kernels.kernels.copy_rows, pools=resolved.cache.pools
    )


def _num_windows(resolved: Resolved) -> int:
    return sum(pool.window is not None for pool in resolved.cache.pools)


def _first_slot(resolved: Resolved) -> int:
    """For a warm-up: -1 if the model keeps no states."""
    return 0 if any(pool.kind is CacheKind.STATE for pool in resolved.cache.pools) else -1


def _row_table(resolved: Resolved) -> RowTable:
    config = resolved.config
    return RowTable(
        num_rows=config.scheduler.max_running_requests,
        max_pages=-(-config.model.context_length // config.memory.page_size),
        device=resolved.device,
        num_windows=_num_windows(resolved),
    )


def _set_cpu_options(resolved: Resolved) -> None:
    """Last, since what is built before may have computed something with other threads."""
    if resolved.device.type == "cpu":
        execution = resolved.config.execution
        resolved.kernels.kernels.set_num_threads(execution.num_threads)
        kernels, asked = resolved.kernels.kernels, resolved.asked.execution
        is_asked = asked.cpu_products is not None or asked.enable_deterministic_inference
        # By default only where the compiled kernels serve; the others refuse exact products.
        can_be = is_asked or kernels.name == "cpu"
        kernels.set_exact_products(execution.cpu_products == "exact" and can_be)
        if isinstance(resolved.shape, ForeignConfig):
            # Its layers are torch's, to which the kernels have left one thread.
            torch.set_num_threads(resolved.config.execution.num_threads)


# ---- models that generate ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recording:
    """How steps are recorded where kernels cannot record them themselves.

    captures  the steps that the device captures; None: it captures none
    why_not   why not; empty: it does, or the device has nothing to capture
    """

    captures: CapturePlan | None
    why_not: str


def _decoder_runner(
    resolved: Resolved,
    models: Models,
    recording: Recording,
    watch: LoadWatch,
    every_cache: list[tuple[Tensor, ...]],
    grammars: GrammarParts | None,
    routed_experts: RoutedExperts | None,
    adapters: AdapterParts | None,
    member: RankMember,
) -> Runner:
    model = models.model
    config, device, kernels = resolved.config, resolved.device, resolved.kernels.kernels
    page_size = config.memory.page_size
    captures = recording.captures
    num_caches = resolved.decoder.num_caches
    kv_caches = awaited(resolved.device, every_cache[:num_caches])
    rows = _row_table(resolved)
    common: list[LogitsProcessor] = [
        LogitBias(device),
        Penalties(device, kernels),
        MinNewTokens(resolved.eos, device),
        AllowedTokens(device),
        SpeechTokens(device),
    ]
    sampler = Sampler(rows, (), FollowingOps())

    def capture() -> Recorded:
        plan = _capture_plan(resolved)
        recorder, memory = capture_on(device), memory_of(device)
        having = None if adapters is None else steps_with_adapters(adapters, kernels, plan)
        return capture_on_device(model, kernels, kv_caches, plan, recorder, memory, watch, having)

    record = partial(
        record_steps,
        model,
        kernels,
        kv_caches,
        group_of_layer=_places(resolved).group_of_layer,
        enabled=not config.execution.disable_graphs,
        states=None if models.draft is None else models.draft.captures,
        capture=None if captures is None else capture,
        why_not_captured=recording.why_not,
    )
    choice = record()
    resolved.decisions.append(Decision("graphs", "on" if choice.is_recorded else "off", choice.why))
    failures: dict[int, str] = {}
    masks = None
    if member.leads and grammars is not None:
        masks = grammars.masks(kernels, failures)
    drafter = None
    if models.draft is not None:
        memory = _draft_memory(resolved, rows, every_cache)
        ahead = None if masks is None else GrammarsAhead(masks, kernels)
        guessing = GuessSampler(Sampler(rows, common, kernels), ahead)
        drafter = models.draft.make_drafter(memory, guessing)
    _set_cpu_options(resolved)
    if member.leads:
        ops = choice.sampling_ops or kernels
        sampler = _sampler(resolved, rows, common, ops, failures, masks)
    # With several stages every plan brings its tokens.
    overlaps = config.scheduler.overlap_depth > 1 and resolved.stage.count == 1
    same_requests = member.attention or member.tp
    return Runner(
        model,
        choice.steps,
        kv_caches=kv_caches,
        rows=rows,
        sampler=sampler,
        page_size=page_size,
        device=device,
        places=_places(resolved),
        routed_experts=routed_experts,
        adapters=None if adapters is None else adapters.pool,
        drafter=drafter,
        share=same_requests.broadcast if overlaps and same_requests.size > 1 else None,
        record_anew=lambda: record().steps,
        sight=_sight(resolved, models.tower),
    )


def _sight(resolved: Resolved, tower: Tower | None) -> Sight | None:
    if tower is None:
        return None
    return Sight(tower, hidden_size=resolved.decoder.hidden_size, device=resolved.device)


def _stage_runner(
    resolved: Resolved,
    model: Decoder,
    kv_caches: list[tuple[Tensor, ...]],
    adapters: AdapterParts | None = None,
) -> StageRunner:
    rows = _row_table(resolved)
    _set_cpu_options(resolved)
    return StageRunner(
        model,
        kv_caches=awaited(resolved.device, kv_caches),
        rows=rows,
        page_size=resolved.config.memory.page_size,
        device=resolved.device,
        places=_places(resolved),
        adapters=None if adapters is None else adapters.pool,
    )


def _draft_memory(
    resolved: Resolved, rows: RowTable, every_cache: list[tuple[Tensor, ...]]
) -> DraftMemory:
    """Where the draft model finds its keys: after those of the model's layers."""
    draft, target = resolved.draft, resolved.decoder
    assert draft is not None
    first = target.num_caches - draft.first_layer(target)
    own = shifted(draft.cache_groups(target), -first)
    return DraftMemory(
        rows=rows,
        places=CachePlaces(own, pools=resolved.cache.pools),
        kv_caches=every_cache[first:],
        page_size=resolved.config.memory.page_size,
        device=resolved.device,
    )


def _sampler(
    resolved: Resolved,
    rows: RowTable,
    common: Sequence[LogitsProcessor],
    ops: SamplingOps,
    failures: dict[int, str],
    masks: GrammarMasks | None,
) -> Sampler:
    """The sampler of the rank that chooses tokens.

    common  the processors that a drafter's choices go through too
    """
    allow_code = resolved.config.execution.enable_custom_logit_processor
    processors = [
        *common,
        CustomProcessors(failures, allow_code=allow_code),
        ThinkingBudgets(),
    ]
    asked = resolved.config.speculation
    thresholds = None
    if asked.is_lossy:
        thresholds = AcceptThresholds(
            single=asked.speculative_accept_threshold_single,
            accumulated=asked.speculative_accept_threshold_acc,
        )
    return Sampler(rows, processors, ops, failures, masks, thresholds)


def _capture_plan(resolved: Resolved) -> CapturePlan:
    """The steps that a GPU captures, for the pools as they are now known."""
    return capture_plan(resolved.config, resolved.decoder, _places(resolved), resolved.pool_sizes)


def _why_not_captured(resolved: Resolved, experts: MovableExperts) -> str:
    """Why a GPU captures no steps of the loaded model; empty: it captures them.

    experts  the model's layers of experts"""
    why = why_not_captured(resolved)
    if why is None and not all(layer.can_be_captured for layer in experts.layers):
        return "not all experts of a layer are stored alike, so that each is computed by itself"
    return why or ""


def _with_measured_pool(
    resolved: Resolved, model: DecoderModel, captures: CapturePlan | None
) -> Resolved:
    """The configuration with a KV pool of measured size, instead of the estimated one."""
    config = resolved.config
    with timed("measuring the largest step"):
        pool = measure_pool(
            config,
            resolved.cache,
            model,
            _places(resolved),
            resolved.kernels.kernels,
            memory_of(resolved.device),
            captures=captures,
            wanted_tokens=resolved.wanted_tokens,
            chooses_tokens=resolved.stage.is_last,
        )
    num_tokens = pool.num_pages * config.memory.page_size
    memory = replace(config.memory, max_total_tokens=num_tokens)
    kept = [decision for decision in resolved.decisions if decision.option != "max_total_tokens"]
    why = pool.why
    if len(resolved.cache.pools) > 1:
        why += f"; {resolved.cache.explained(num_tokens)}"
    kept.append(Decision("max_total_tokens", num_tokens, why))
    return replace(resolved, config=replace(config, memory=memory), decisions=kept)


# ---- models that make embeddings or scores -------------------------------------------------------


def _load_encoder(
    resolved: Resolved, shape: EncoderConfig, watch: LoadWatch, build: Build, num_labels: int
) -> Encoder:
    with timed("model structure"):
        # Its embedding keeps its dtype: vectors are compared across programs.
        build = replace(build, embedding_dtype=None)
        model = encoder_class(shape.architecture)(shape, build, num_labels=num_labels)
    config, files = resolved.config, resolved.files
    fill(model, files, config, resolved.dtype, name_of=model.checkpoint_name, watch=watch)
    return model


def _pooling_execute(
    resolved: Resolved, pooling: Pooling, watch: LoadWatch, member: RankMember
) -> tuple[Execute, Tower | None]:
    """(computes steps of a model that makes embeddings or scores, sees for it); the last stage
    pools."""
    build, num_labels = build_of(resolved, member), len(pooling.labels)
    if isinstance(resolved.shape, EncoderConfig):
        encoder = _load_encoder(resolved, resolved.shape, watch, build, num_labels)
        return _pooling_runner(resolved, pooling, encoder, watch).execute, None
    shape = resolved.decoder
    with timed("model structure"):
        decoder = Decoder.of(shape, build, resolved.stage, member.pipe)
        head = decoder_head(shape.hidden_size, num_labels, resolved.device)
        model = PooledDecoder(decoder, head)
    fill(
        model,
        resolved.files,
        resolved.config,
        resolved.dtype,
        name_of=model.checkpoint_name,
        wanted=lambda name: not model.is_elsewhere(name),
        watch=watch,
    )
    if not resolved.stage.is_last:
        return _stage_runner(resolved, decoder, _kv_caches(resolved, watch)).execute, None
    tower = load_tower(resolved, build, watch)
    return _pooling_runner(resolved, pooling, model, watch, tower).execute, tower


def _pooling_runner(
    resolved: Resolved,
    pooling: Pooling,
    model: PoolingModel,
    watch: LoadWatch,
    tower: Tower | None = None,
) -> PoolingRunner:
    config, shape = resolved.config, resolved.shape
    kv_caches = _kv_caches(resolved, watch)
    rows = _row_table(resolved)
    _set_cpu_options(resolved)
    return PoolingRunner(
        model,
        Pooler(
            pooling.method,
            num_rows=config.scheduler.max_running_requests,
            hidden_size=shape.hidden_size,
            device=resolved.device,
            normalize=pooling.normalize,
        ),
        kv_caches=kv_caches,
        rows=rows,
        page_size=config.memory.page_size,
        device=resolved.device,
        places=_places(resolved),
        sight=_sight(resolved, tower),
    )
