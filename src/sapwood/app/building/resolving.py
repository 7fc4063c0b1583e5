"""Finds the model, and the facts by which the configuration is resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sapwood.app.building.deterministic import check_fixed_on_gpu
from sapwood.app.building.draft_model import Draft, FoundDraft, find_draft, resolve_draft
from sapwood.app.building.loading import checkpoint_format, refuse_absurd_size
from sapwood.app.building.model_defaults import (
    checkpoint_dtype,
    eos_token_ids,
    read_json,
    reading,
)
from sapwood.app.building.model_files import open_model
from sapwood.app.building.model_impl import TRANSFORMERS, choose_impl
from sapwood.app.ranks.expert_location import initial_placements
from sapwood.base.errors import ConfigError
from sapwood.distributed import deepep
from sapwood.kernels.cpu import fast_bfloat16, slower_because
from sapwood.kernels.kv_cache import DTYPES, KV_CACHE_DTYPES
from sapwood.kernels.platform import Platform, device_memory, find_device, read_platform
from sapwood.kernels.registry import Need, Selection, select_kernels
from sapwood.models.config import DecoderConfig, architecture_of, refuse_absurd_layers
from sapwood.models.encoder.config import EncoderConfig
from sapwood.models.foreign.structure import ForeignConfig, read_foreign
from sapwood.models.lm.architecture import attention_features
from sapwood.models.pooling import pooling_of
from sapwood.models.registry import ARCHITECTURES, encoder_class, read_decoder
from sapwood.models.splitting import refuse_split
from sapwood.models.text_part import WRAPPERS, text_part
from sapwood.schema.cache import CacheGroup, CacheKind, CachePlan
from sapwood.schema.config.decision import Decision
from sapwood.schema.config.engine import EngineConfig, ResolvedConfig
from sapwood.schema.config.execution import ExecutionConfig
from sapwood.schema.config.facts import CheckpointFacts, MachineFacts, ModelFacts
from sapwood.schema.config.model import ModelConfig
from sapwood.schema.config.parallel import DEEPEP, ParallelConfig
from sapwood.schema.config.resolve import demand_of, resolve
from sapwood.schema.kv_events import of_rank
from sapwood.schema.pooling import Pooling
from sapwood.schema.stage import Stage
from sapwood.store import ModelFiles, Progress

Shape = DecoderConfig | EncoderConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The resolved configuration, with everything that was found out on the way.

    asked    the configuration before that
    shape    the model's sizes
    eos      token ids that end an output
    pooling  how the model makes embeddings or scores; None: the model generates
    stage    which layers this rank has
    draft    the model that guesses tokens; None: there is none
    wanted_tokens  size of the KV pool in tokens, if the options say it; None: they do not
    placements  by layer, the expert of each slot at the start; of other layers as they have it
    replica  number of the replica
    """

    config: ResolvedConfig
    asked: EngineConfig
    decisions: list[Decision]
    files: ModelFiles
    shape: Shape
    eos: frozenset[int]
    kernels: Selection
    stage: Stage
    draft: Draft | None = None
    pooling: Pooling | None = None
    wanted_tokens: int | None = None
    placements: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    replica: int = 0

    @property
    def decoder(self) -> DecoderConfig:
        """The model's sizes; ConfigError for an encoder, which cannot generate."""
        if isinstance(self.shape, DecoderConfig):
            return self.shape
        raise ConfigError(
            f"{self.files.name} is an encoder, which generates nothing; choose another model"
        )

    @property
    def model_groups(self) -> tuple[CacheGroup, ...]:
        """The cache groups of the model alone."""
        return self.shape.cache_groups if isinstance(self.shape, DecoderConfig) else ()

    @property
    def cache(self) -> CachePlan:
        """What tokens leave behind in the model's layers, and in those of its draft model, which
        come after them; nothing in an encoder's."""
        config = self.config
        groups = self.model_groups
        if self.draft is not None:
            groups += self.draft.cache_groups(self.decoder)
        return CachePlan(
            groups=tuple(
                group.of_rank(config.parallel.attention_size).with_dtypes(
                    kv=config.memory.kv_cache_dtype,
                    activations=config.model.dtype,
                    recurrent=config.memory.mamba_ssm_dtype,
                )
                for group in groups
            ),
            page_size=config.memory.page_size,
            demand=demand_of(config.scheduler, config.model),
            state_interval=config.memory.mamba_track_interval or config.memory.page_size,
            num_states=config.memory.max_mamba_cache_size,
            state_memory_ratio=config.memory.mamba_full_memory_ratio or 1.0,
            window_share=config.memory.swa_full_tokens_ratio,
            held=self.held,
        )

    @property
    def held(self) -> frozenset[int] | None:
        """The layers whose caches this rank has, as in CachePlan."""
        return None if self.stage.count == 1 else self.decoder.caches_of(self.stage.layers)

    @property
    def pool_sizes(self) -> tuple[int, ...]:
        """Pages, or slots, of each pool."""
        return self.cache.sizes(self.config.memory.max_total_tokens)

    @property
    def device(self) -> torch.device:
        return torch.device(self.config.execution.device)

    @property
    def dtype(self) -> torch.dtype:
        """The data type of activations."""
        return DTYPES[self.config.model.dtype]


def resolve_config(
    asked: EngineConfig,
    *,
    home: Path,
    progress: Progress | None = None,
    is_verified: bool = False,
    replica: int = 0,
    rank: int = 0,
    decided: ResolvedConfig | None = None,
) -> Resolved:
    """Find the model and make every open choice. StartupError if that is impossible.

    is_verified  whether the files have been compared with their checksums already, if they must be
    replica  number of the replica whose choices these are
    rank     of a model that several ranks share
    decided  the choices of rank 0, which every other rank takes over but for its device, its
             threads and its estimate of the KV pool; None: this is rank 0
    """
    given = asked
    files = fetch_files(asked, home=home, progress=progress, is_verified=is_verified)
    hf_config = read_json(files.path / "config.json")
    with reading(files.path / "config.json"):
        pooling = pooling_of(
            hf_config,
            files.path,
            is_embedding=asked.model.is_embedding,
            method=asked.model.pooling_method,
        )
        impl = choose_impl(
            asked.model,
            hf_config,
            files,
            (*ARCHITECTURES.names(), *WRAPPERS),
            generates=pooling is None,
        )
        asked = replace(asked, model=replace(asked.model, model_impl=str(impl.value)))
        shape = read_shape(hf_config, pooling, files, asked.model)
        dtype = checkpoint_dtype(dict(text_part(hf_config)))
    _check_experts(asked, shape, pooling)
    is_dummy = asked.model.load_format == "dummy"
    if isinstance(shape, ForeignConfig) and asked.parallel.num_ranks > 1:
        raise ConfigError(
            f"{files.name} is computed by the transformers library, whose layers are not shared "
            "among ranks; leave out --tp-size and --pp-size"
        )
    stage = asked.parallel.stage_of(rank, shape.num_layers)
    if stage.count > 1:
        _check_stages(asked, shape, stage, files.name)
    if not is_dummy:
        refuse_absurd_size(files, shape.num_parameters)
    platform = read_platform()
    asked = replace(asked, execution=on_own_device(asked, platform, replica, rank))
    machine = machine_facts(platform, asked.execution.device, asked.execution.kernels)
    machine = of_one_rank(machine, asked.parallel)
    facts = replace(
        model_facts(files, shape, dtype, "dummy" if is_dummy else files.weight_format),
        makes_numbers=pooling is not None,
    )
    if isinstance(shape, DecoderConfig):
        facts = facts.of_stage(stage, shape.num_layers, shape.caches_of(stage.layers))
    facts = facts.of_rank(asked.parallel.attention_size)
    found = None
    if isinstance(shape, DecoderConfig):
        found = find_draft(asked, files, shape, home=home, progress=progress)
        if found is not None:
            facts = _with_draft(facts, shape, found)
    config, decisions = resolve(asked, machine, facts)
    if decided is not None:
        memory = replace(decided.memory, max_total_tokens=config.memory.max_total_tokens)
        config = replace(decided, memory=memory, execution=config.execution)
    decisions.insert(0, impl)
    shape = shape.for_context(config.model.context_length)
    draft = None
    if found is not None and isinstance(shape, DecoderConfig):
        is_random = found.asked.model.load_format == "dummy"
        form = "dummy" if is_random else found.files.weight_format
        of_draft = model_facts(found.files, found.shape, found.dtype, form)
        draft = resolve_draft(found, config, shape, machine, of_draft, decisions)
    _refuse_split_pages(shape, config.memory.page_size)
    shapes = (shape,) if draft is None else (shape, draft.shape)
    kernels = _choose_kernels(config, shapes, platform, decisions)
    config = _with_products(config, asked, shape, kernels.kernels.name, decisions)
    check_fixed_on_gpu(config, shape, kernels.kernels.name, generates=pooling is None)
    if pooling is not None:
        decisions.append(Decision("pooling_method", pooling.method, pooling.why))
        model = replace(config.model, is_embedding=True, pooling_method=pooling.method)
        config = replace(config, model=model)
    resolved = Resolved(
        config=config,
        asked=given,
        decisions=decisions,
        files=files,
        shape=shape,
        eos=eos_token_ids(files.path, vocab_size=shape.vocab_size),
        kernels=kernels,
        stage=stage,
        draft=draft,
        pooling=pooling,
        wanted_tokens=None
        if asked.memory.max_total_tokens is None
        else config.memory.max_total_tokens,
        placements=initial_placements(asked.parallel, shape)
        if isinstance(shape, DecoderConfig)
        else {},
        replica=replica,
    )
    _check_kv_events(resolved)
    _check_deepep(resolved)
    return resolved


def _with_products(
    config: ResolvedConfig,
    asked: EngineConfig,
    shape: Shape,
    kernels: str,
    decisions: list[Decision],
) -> ResolvedConfig:
    """Only the compiled kernels have exact products: others compute fast ones unless exact ones
    were asked for. Then ConfigError."""
    if config.execution.cpu_products != "exact":
        return config
    if isinstance(shape, ForeignConfig):
        why = "the layers of the transformers library compute"
    elif kernels != "cpu":
        why = f"kernels {kernels} compute"
    else:
        return config
    flags = {
        "--enable-deterministic-inference": asked.execution.enable_deterministic_inference,
        "--cpu-products exact": asked.execution.cpu_products == "exact",
    }
    given = [flag for flag, is_given in flags.items() if is_given]
    if given:
        raise ConfigError(
            f"{given[0]} holds for sapwood's compiled kernels, but {why}; leave it out"
        )
    decisions[:] = [one for one in decisions if one.option != "cpu_products"]
    decisions.append(
        Decision("cpu_products", "fast", f"{why}; only compiled kernels have exact ones")
    )
    return replace(config, execution=replace(config.execution, cpu_products="fast"))


def _check_deepep(resolved: Resolved) -> None:
    """ConfigError if DeepEP is to send tokens and cannot."""
    parallel = resolved.config.parallel
    if parallel.moe_a2a_backend != DEEPEP:
        return
    shape = resolved.decoder
    assert shape.experts is not None, "--ep-size above 1 is refused for models without experts"
    reason = deepep.why_not(
        device=resolved.device,
        dtype=resolved.dtype,
        num_ranks=parallel.tp_size,
        row_size=shape.hidden_size,
        num_chosen=shape.experts.num_per_token,
    )
    if reason is not None:
        raise ConfigError(
            f"--moe-a2a-backend deepep cannot be used: {reason}. --moe-a2a-backend torch sends "
            "the same tokens without DeepEP"
        )


def _check_kv_events(resolved: Resolved) -> None:
    """ConfigError if KV events are asked for that cannot be."""
    config = resolved.config
    events = config.memory.kv_events
    if not events.is_on:
        return
    if all(pool.kind is not CacheKind.FULL for pool in resolved.cache.pools):
        raise ConfigError(
            f"{resolved.files.name} has no layer that keeps keys and values of every token, and "
            "--kv-events-config tells of nothing else; leave it out"
        )
    asked = [one for one in (events.endpoint, events.replay_endpoint) if one is not None]
    used = [of_rank(one, rank) for one in asked for rank in range(config.parallel.dp_size)]
    if len(set(used)) < len(used):
        raise ConfigError(
            f"--kv-events-config has {asked[0]} and {asked[1]}, but each of the "
            f"{config.parallel.dp_size} replicas takes the next port; leave room between them"
        )


def _with_draft(facts: ModelFacts, shape: DecoderConfig, found: FoundDraft) -> ModelFacts:
    """The facts of a model together with its draft model: what both keep of a token."""
    length = min(facts.max_context_length, found.shape.max_context_length)
    return replace(
        facts,
        cache=(*facts.cache, *found.cache_groups(shape, length)),
        positions_are_places=facts.positions_are_places
        or found.shape.has_alibi
        or found.shape.has_chunks,
        draft_bytes=found.num_bytes,
    )


def _refuse_split_pages(shape: Shape, page_size: int) -> None:
    if not isinstance(shape, DecoderConfig) or not (shape.has_chunks and shape.has_windows):
        return
    chunk = shape.sliding_window
    assert chunk is not None, "there are windows"
    if chunk % page_size:
        raise ConfigError(
            f"the model attends to chunks of {chunk} tokens, which pages of {page_size} do not "
            f"make up; start with a --page-size that divides {chunk}"
        )


def _check_experts(asked: EngineConfig, shape: Shape, pooling: Pooling | None) -> None:
    """Raises ConfigError if experts are to be told that nobody knows of, or to be spread that the
    model does not have."""
    if asked.parallel.ep_size > 1 and not (isinstance(shape, DecoderConfig) and shape.experts):
        raise ConfigError(
            f"--ep-size is {asked.parallel.ep_size}, but this model has no experts to spread; "
            "leave it out"
        )
    given = asked.execution.options_of_experts
    if not given:
        return
    if pooling is not None or not isinstance(shape, DecoderConfig) or shape.experts is None:
        why = (
            "transformers computes this model"
            if asked.model.model_impl == TRANSFORMERS
            else "this model has no experts, or generates nothing"
        )
        raise ConfigError(f"{why}; leave out {' and '.join(given)}")


def _check_stages(asked: EngineConfig, shape: Shape, stage: Stage, name: str) -> None:
    """Raises ConfigError if the model's layers cannot be shared out to stages like this one."""
    if not isinstance(shape, DecoderConfig):
        raise ConfigError(f"{name} is an encoder, and --pp-size is for decoders; leave it out")
    for option in asked.execution.options_of_experts:
        raise ConfigError(
            f"{option} tells of the experts of all layers, and each of {stage.count} stages knows "
            "its own; leave it out, or --pp-size"
        )
    refuse_split(shape, stage)


def _choose_kernels(
    config: ResolvedConfig,
    shapes: Sequence[Shape],
    platform: Platform,
    decisions: list[Decision],
) -> Selection:
    """Kernels that can compute all of these models."""
    need = Need(
        device=torch.device(config.execution.device).type,
        dtype=DTYPES[config.model.dtype],
        head_dim=max(
            shape.largest_head_dim if isinstance(shape, DecoderConfig) else shape.head_dim
            for shape in shapes
        ),
        page_size=config.memory.page_size,
        kv_dtype=KV_CACHE_DTYPES[config.memory.kv_cache_dtype],
        attention=frozenset().union(*map(_attention_features, shapes)),
    )
    selection = select_kernels(need, config.execution.kernels)
    kernels = selection.kernels
    why = explain_kernels(selection, slower_because(platform, config.execution.kernels))
    decisions.append(Decision("kernels", kernels.name, why))
    quantization = config.model.quantization
    if quantization is not None and not kernels.multiplies_quantized:
        why = f"{kernels.name} kernels dequantise: no less memory than {config.model.dtype}"
        decisions.append(Decision("quantization", quantization, why))
    return selection


def _attention_features(shape: Shape) -> frozenset[str]:
    """What the model's attention does beyond the plain one, as kernels name it."""
    return attention_features(shape) if isinstance(shape, DecoderConfig) else frozenset()


def fetch_files(
    asked: EngineConfig, *, home: Path, progress: Progress | None = None, is_verified: bool = False
) -> ModelFiles:
    return open_model(
        asked.model,
        home=home,
        is_verified=is_verified,
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


def on_own_device(
    asked: EngineConfig, platform: Platform, replica: int, rank: int
) -> ExecutionConfig:
    """The options of execution with the GPU of this rank, or of this replica; ConfigError if there
    are too few."""
    execution, parallel = asked.execution, asked.parallel
    num_replicas, num_ranks = parallel.dp_size, parallel.ranks_per_node
    device = find_device(execution.device, platform)
    base = execution.base_gpu_id
    if base and (device.type != "cuda" or execution.device not in (None, "auto", "cuda")):
        raise ConfigError(
            f"--base-gpu-id is {base}, but the device is {device}; leave one of --base-gpu-id and "
            "--device out"
        )
    if device.type == "cpu" or num_replicas * num_ranks == 1 == 1 + base:
        return execution
    if num_replicas > 1 and num_ranks > 1:
        raise ConfigError(
            "--dp-size does not go together with --tp-size on GPUs yet; run one server per "
            "replica, and `sapwood gateway` in front of them"
        )
    is_named = device.index is not None and execution.device not in (None, "auto")
    num_devices = torch.cuda.device_count()
    if is_named or base + num_replicas * num_ranks > num_devices:
        raise ConfigError(
            f"each of {num_replicas * num_ranks} ranks or replicas on this machine takes a GPU of "
            f"its own, but it has {num_devices}, --base-gpu-id is {base}, and --device is "
            f"{execution.device}; use --device cuda and a smaller --tp-size or --dp-size"
        )
    number = base + replica + rank - parallel.own_ranks[0]
    return replace(execution, device=f"{device.type}:{number}")


def of_one_rank(machine: MachineFacts, parallel: ParallelConfig) -> MachineFacts:
    """A rank's share of the machine: of its cores, and of its memory unless each has a GPU."""
    num_ranks = parallel.ranks_per_node
    machine = replace(machine, num_cores=max(1, machine.num_cores // num_ranks))
    if machine.device != "cpu":
        return machine
    return replace(
        machine,
        memory_bytes=machine.memory_bytes // num_ranks,
        available_bytes=machine.available_bytes // num_ranks,
    )


def model_facts(files: ModelFiles, shape: Shape, dtype: str, weight_format: str) -> ModelFacts:
    """What resolution needs to know of a model; ConfigError for an unknown checkpoint format."""
    form = checkpoint_format(files)
    match shape:
        case EncoderConfig():
            length, longest = shape.context_length, shape.num_positions
            cache: tuple[CacheGroup, ...] = ()
            positions_are_places = False
        case DecoderConfig():
            length = shape.context_length
            longest = max(shape.rope.max_context_length, length)
            cache = replace(shape, context_length=longest).cache_groups
            positions_are_places = shape.has_alibi or shape.has_chunks
    return ModelFacts(
        name=files.name,
        context_length=length,
        max_context_length=longest,
        dtype=dtype,
        num_parameters=shape.num_parameters,
        num_embedding_parameters=shape.vocab_size * shape.hidden_size,
        weight_format=weight_format,
        file_bytes=0
        if weight_format == "dummy"
        else sum(path.stat().st_size for path in files.weights),
        cache=cache,
        whole_prompts=isinstance(shape, EncoderConfig),
        positions_are_places=positions_are_places,
        quantized=None
        if form is None
        else CheckpointFacts(form.name, form.summary, form.weight_bytes),
    )


def read_shape(
    hf_config: Mapping[str, Any], pooling: Pooling | None, files: ModelFiles, asked: ModelConfig
) -> Shape:
    """The sizes of the model; ConfigError if its architecture is not implemented."""
    refuse_absurd_layers(hf_config)
    if asked.model_impl == TRANSFORMERS:
        return read_foreign(files.path, hf_config, trust_remote_code=asked.trust_remote_code)
    if pooling is None:
        return read_decoder(hf_config)
    if pooling.decoder is None:
        return encoder_class(architecture_of(hf_config)).read(
            hf_config, max_tokens=pooling.max_tokens
        )
    # With tied embeddings there is no output layer to be loaded.
    as_decoder = {**hf_config, "architectures": [pooling.decoder], "tie_word_embeddings": True}
    return read_decoder(as_decoder)
