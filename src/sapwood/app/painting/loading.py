"""From a folder to a pipeline in memory: which backend, in which precisions, and why."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sapwood.app.painting.folder import GGUF, PaintingFolder, read_folder
from sapwood.app.painting.memory import no_room, other_precisions, picture_notes, picture_shape
from sapwood.base.errors import ConfigError, InvalidRequest
from sapwood.diffusion.memory import PictureMemory
from sapwood.diffusion.scheduler import PaintingLimits
from sapwood.kernels.platform import device_memory, read_platform
from sapwood.layers.quantization import SCHEMES
from sapwood.pipelines.components import Precisions
from sapwood.pipelines.interface import Pipeline
from sapwood.pipelines.loras import PictureAdapters
from sapwood.pipelines.registry import PIPELINES, load_pipeline
from sapwood.schema.config.painting import PaintingConfig
from sapwood.schema.painting import LoraWish

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class PaintingPlan:
    """How a folder would be served; nothing has been loaded.

    backend  "sapwood" or "diffusers"
    lora     the adapter that adds from the start
    dit_file    the weights of what draws, if they are not the folder's
    dit_scheme  in which they are kept: a name of layers/quantization
    memory   what pictures take beside the weights; None: the folder does not tell
    notes    one line for each choice, with its reason
    problem  why it cannot be served on this machine; None: it can
    """

    folder: PaintingFolder
    backend: str
    vae_tiling: bool
    lora: LoraWish | None
    dit_file: Path | None
    dit_scheme: str
    limits: PaintingLimits
    memory: PictureMemory | None
    notes: tuple[str, ...]
    problem: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPipeline:
    """adapters: LoRA's; what adds from the start is set"""

    pipeline: Pipeline
    plan: PaintingPlan
    adapters: PictureAdapters
    load_s: float


def plan_painting(model: str, config: PaintingConfig) -> PaintingPlan:
    """Raises ModelSourceError if the folder cannot be read, and ConfigError for options that do
    not fit it."""
    folder = read_folder(Path(model), config)
    backend, why = _backend(folder.pipeline, config.backend)
    free, _ = device_memory(torch.device("cpu"), read_platform())
    need = folder.num_bytes
    notes = [f"backend {backend}: {why}"]
    notes += [
        f"{each.name}: {each.class_name} in {each.precision}, {each.num_bytes / 1e6:.1f} MB in "
        f"memory ({each.file_bytes / 1e6:.1f} MB stored)"
        for each in folder.components
    ]
    dit_file = None if config.dit_path is None else Path(config.dit_path)
    scheme = _scheme(config, dit_file, backend)
    if scheme != "none":
        notes.append(f"the transformer's weights are kept as {scheme}")
    notes.append(f"weights take {need / 1e9:.2f} GB of {free / 1e9:.2f} GB that are free")
    notes += other_precisions(folder, config)
    shape = picture_shape(folder)
    memory, problem = None, None
    if need > free:
        problem = _too_large(folder, free)
    elif shape is not None:
        left = free - need - config.text_cache_bytes
        memory = shape.memory(left, vae_tiling=config.vae_tiling)
        notes += picture_notes(shape, memory, config)
        problem = no_room(shape, memory)
    lora = None
    if config.lora_path is not None:
        if backend == "diffusers":
            raise ConfigError(
                "--lora-path is for pipelines that sapwood draws itself, not for the backend "
                "diffusers; leave it out"
            )
        lora = LoraWish(
            nickname=config.lora_nickname, path=config.lora_path, strength=config.lora_scale
        )
        notes.append(f"LoRA: {lora.path} adds from the start, at strength {lora.strength:g}")
    max_step_tokens = config.max_step_tokens
    if memory is not None and problem is None:
        max_step_tokens = min(max_step_tokens, memory.max_tokens)
    limits = PaintingLimits(
        max_running=config.max_running_pictures,
        max_waiting=config.max_waiting_pictures,
        max_step_tokens=max_step_tokens,
    )
    return PaintingPlan(
        folder=folder,
        backend=backend,
        vae_tiling=config.vae_tiling,
        lora=lora,
        dit_file=dit_file,
        dit_scheme=scheme,
        limits=limits,
        memory=memory,
        notes=tuple(notes),
        problem=problem,
    )


def _too_large(folder: PaintingFolder, free: int) -> str:
    """Why the weights cannot be loaded."""
    need = folder.num_bytes
    halved = sum(each.num_bytes // 2 for each in folder.components if each.precision == "fp32")
    hint = f"; in bf16 they would take {(need - halved) / 1e9:.2f} GB" if halved else ""
    return (
        f"the weights take {need / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free{hint}"
        " (--dit-precision, --text-encoder-precisions, --vae-precision)"
    )


def load_painting(
    plan: PaintingPlan, *, beat: Callable[[str], None] = lambda doing: None
) -> LoadedPipeline:
    """Raises StartupError if the weights do not fit the pipeline, or this machine."""
    if plan.problem is not None:
        raise ConfigError(plan.problem)
    started_s = time.monotonic()
    folder = plan.folder
    precisions = Precisions(
        dit=_TYPES[folder.precision("dit")],
        text_encoders=tuple(_TYPES[folder.precision("text", index)] for index in range(4)),
        vae=_TYPES[folder.precision("vae")],
        vae_tiling=plan.vae_tiling,
        dit_scheme=SCHEMES.get(plan.dit_scheme)(),
    )
    beat("loading the weights")
    adapters = PictureAdapters()
    pipeline: Pipeline
    if plan.backend == "diffusers":
        from sapwood.pipelines.through_diffusers import DiffusersPipeline

        pipeline = DiffusersPipeline.load(folder.path, precisions.dit, vae_tiling=plan.vae_tiling)
    else:
        pipeline = load_pipeline(folder.path, precisions, adapters=adapters, dit_file=plan.dit_file)
    if plan.lora is not None:
        beat("loading the LoRA adapter")
        try:
            adapters.set([plan.lora])
        except InvalidRequest as error:
            raise ConfigError(f"--lora-path: {error.message}") from error
    load_s = time.monotonic() - started_s
    together = pipeline.traits.max_together
    if together is not None:
        limits = replace(plan.limits, max_running=min(together, plan.limits.max_running))
        plan = replace(plan, limits=limits)
    return LoadedPipeline(pipeline=pipeline, plan=plan, adapters=adapters, load_s=load_s)


def _scheme(config: PaintingConfig, dit_file: Path | None, backend: str) -> str:
    """How the transformer's weights are kept."""
    asked = config.dit_quantization
    if backend == "diffusers" and (asked != "none" or dit_file is not None):
        raise ConfigError(
            "--dit-quantization and --dit-path are for pipelines that sapwood draws itself, not "
            "for the backend diffusers; leave them out"
        )
    if asked == "none" and dit_file is not None and dit_file.suffix == GGUF:
        return "gguf"
    return asked


def _backend(pipeline: str, asked: str) -> tuple[str, str]:
    """(who draws, why)"""
    is_known = pipeline in PIPELINES
    if asked == "sapwood" and not is_known:
        raise ConfigError(
            f"sapwood has no {pipeline or 'pipeline without a class'} (it has "
            f"{', '.join(sorted(PIPELINES))}); start with --backend diffusers"
        )
    if asked == "diffusers":
        return "diffusers", "--backend asks for it; one picture at a time"
    if is_known:
        return "sapwood", f"it has {pipeline}"
    return "diffusers", f"sapwood has no {pipeline} of its own; one picture at a time"
