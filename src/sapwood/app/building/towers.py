"""Loads what sees pictures and videos for a decoder."""

from __future__ import annotations

from dataclasses import replace

from sapwood.app.building.loading import LoadWatch, fill, timed
from sapwood.app.building.model_defaults import read_json, reading
from sapwood.app.building.resolving import Resolved
from sapwood.engine.media import MediaVectors
from sapwood.layers.build import Build, Groups
from sapwood.layers.quantization.dense import DENSE
from sapwood.models.config import DecoderConfig
from sapwood.models.vision.interface import AttendedTower, Tower
from sapwood.models.vision.registry import tower_class
from sapwood.schema.config.decision import Decision

MEGABYTE = 1 << 20
FEWEST_SOUNDS = 8
"""Sounds whose vectors have room at once at least, where layers attend to them."""


def load_tower(resolved: Resolved, build: Build, watch: LoadWatch) -> Tower | None:
    """The tower of a model that sees, with its weights; None: requests may bring only text.

    The log of decisions says why not, if the model is known to see."""
    path = resolved.files.path / "config.json"
    with reading(path):
        hf_config = read_json(path)
        found = tower_class(hf_config)
    if found is None:
        return None
    why_not = _why_not(resolved) or _why_not_of(resolved, found)
    if why_not is not None:
        resolved.decisions.append(Decision("sees", "off", why_not))
        return None
    with timed("tower structure"), reading(path):
        own = replace(
            build, scheme=DENSE, embedding_dtype=None, groups=Groups(),
            adapters=None, routes=None, experts=None, rows=None, exchange=None,
        )  # fmt: skip
        tower = found(hf_config, own)
    targets = tower.targets()
    fill(
        tower,
        resolved.files,
        resolved.config,
        resolved.dtype,
        name_of=tower.checkpoint_name,
        wanted=targets.__contains__,
        watch=watch,
    )
    resolved.decisions.append(Decision("sees", "on", f"the model has a {found.__name__}"))
    return tower


def media_vectors(resolved: Resolved, tower: Tower | None) -> MediaVectors | None:
    """The scheduler's account of that tower's vectors."""
    if tower is None:
        return None
    config = resolved.config.vision
    vector_bytes = tower.vector_size * resolved.dtype.itemsize
    num_across = tower.num_across if isinstance(tower, AttendedTower) else 0
    most = config.vlm_cache_size_mb * MEGABYTE
    return MediaVectors(
        tower,
        vector_bytes=vector_bytes,
        max_bytes=max(most, FEWEST_SOUNDS * num_across * vector_bytes),
        patches_per_step=config.max_encoder_patches_per_step,
        target_s=resolved.config.scheduler.max_step_time_ms / 1000,
        must_hear=num_across > 0,
    )


def _why_not_of(resolved: Resolved, tower: type[Tower]) -> str | None:
    """Why that tower cannot be used here."""
    if resolved.config.parallel.num_ranks > 1 and not tower.over_ranks:
        return "this model's decoder hears nothing where several ranks share it"
    dtype = str(resolved.config.memory.kv_cache_dtype)
    if tower.attends_both_ways and dtype not in ("auto", str(resolved.dtype).split(".")[-1]):
        return (
            "pictures whose tokens see one another need keys and values of the model's dtype, not "
            f"--kv-cache-dtype {dtype}"
        )
    return None


def _why_not(resolved: Resolved) -> str | None:
    """Why a model that sees serves only text here."""
    if resolved.config.vision.language_only:
        return "--language-only"
    if resolved.device.type != "cpu" and resolved.config.execution.enable_deterministic_inference:
        return "--enable-deterministic-inference: on a GPU towers compute with torch's products"
    if resolved.draft is not None:
        return "with a draft model, which sees nothing, models take only text"
    if isinstance(resolved.shape, DecoderConfig) and resolved.shape.switch_length is not None:
        return "models that rotate long texts otherwise take only text"
    if resolved.config.parallel.pp_size > 1:
        return "models whose layers are split into stages (--pp-size) take only text"
    if resolved.config.parallel.enable_dp_attention:
        return "with --enable-dp-attention models take only text"
    return None
