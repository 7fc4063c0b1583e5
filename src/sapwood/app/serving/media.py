"""What prepares the pictures and videos of one model's requests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sapwood.app.building.model_defaults import read_json_if_there
from sapwood.base.errors import ConfigError
from sapwood.multimodal.family import FAMILIES, ONE_TOKEN, TOKENS, FamilySetting
from sapwood.multimodal.fetch import Fetcher
from sapwood.multimodal.limits import MediaLimits
from sapwood.multimodal.listener import Listener
from sapwood.multimodal.preparer import MediaPreparer
from sapwood.schema.config.media import MediaConfig
from sapwood.schema.config.options import option_specs
from sapwood.text.tokenizer import Tokenizer

_IDS = {
    "image": ("image_token_id", "image_token_index"),
    "video": ("video_token_id", "video_token_index"),
}


def build_preparer(
    directory: Path,
    model: Mapping[str, Any],
    tokenizer: Tokenizer,
    config: MediaConfig,
    *,
    language_only: bool = False,
) -> MediaPreparer | None:
    """None if the model takes only text, as far as its files and the families known here say.

    language_only  whether it takes only text whatever they say
    Raises         ConfigError for options of media that would change nothing
    """
    if language_only:
        _refuse_options(config)
        return None
    token_ids = {
        kind: int(model[name])
        for kind, names in _IDS.items()
        for name in names
        if isinstance(model.get(name), int)
    }
    family = model.get("model_type")
    for kind, text in TOKENS.get(str(family), {}).items():
        found = tokenizer.encode(text, add_special_tokens=False)
        if len(found) == 1:
            token_ids[kind] = found[0]
    if family in ONE_TOKEN and "image" in token_ids:
        token_ids["video"] = token_ids["image"]
    if family not in FAMILIES or not token_ids or "vision_config" not in model:
        return None
    processor = read_json_if_there(directory / "processor_config.json")
    image = read_json_if_there(directory / "preprocessor_config.json")
    video = read_json_if_there(directory / "video_preprocessor_config.json")
    image = image or processor.get("image_processor") or {}
    video = video or processor.get("video_processor") or {}
    changed = config.process_config
    if "video" in changed and not video:
        # Some repositories have one file for both, but its sizes are those of pictures.
        video = {name: value for name, value in image.items() if name not in _SIZES}
    setting = FamilySetting(
        model_type=model["model_type"],
        image=_changed(image, changed.get("image", {}), "image"),
        video=_changed(video, changed.get("video", {}), "video"),
        processor=processor,
        model=dict(model),
        tokens={
            kind: tokenizer.decode([token_id], skip_special_tokens=False)
            for kind, token_id in token_ids.items()
        },
    )
    cores = os.cpu_count() or 1
    return MediaPreparer(
        setting,
        build_fetcher(config),
        token_ids=token_ids,
        num_copies=max(1, cores // 2),
        timeout_s=config.mm_per_request_timeout,
        most_of_kind=config.most_of_kind,
        max_calls=config.mm_max_concurrent_calls,
    )


def build_listener(model: Mapping[str, Any], config: MediaConfig) -> Listener | None:
    """None if the model hears nothing."""
    if model.get("model_type") != "whisper":
        return None
    return Listener(
        FamilySetting(model_type="whisper", model=dict(model)),
        build_limits(config),
        num_copies=max(1, (os.cpu_count() or 1) // 2),
        num_vectors=int(model.get("max_source_positions", 1500)),
    )


def build_limits(config: MediaConfig) -> MediaLimits:
    return MediaLimits(
        max_image_bytes=config.max_image_bytes,
        max_video_bytes=config.max_video_bytes,
        max_audio_bytes=config.max_audio_bytes,
        max_audio_seconds=config.max_audio_seconds,
        prepare_s=config.mm_per_request_timeout,
    )


_SIZES = ("size", "min_pixels", "max_pixels")
_ANYWHERE = frozenset((*_SIZES, "fps", "num_frames", "min_frames", "max_frames"))
"""Settings that a model's files may leave out and its family reads all the same."""


def _changed(own: Mapping[str, Any], changes: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The model's settings with those of --mm-process-config in their places."""
    unknown = sorted(changes.keys() - own.keys() - _ANYWHERE)
    if unknown:
        raise ConfigError(
            f"--mm-process-config has {', '.join(unknown)[:200]} for {kind}, which this model's "
            f"files do not have; known are {', '.join(sorted(own.keys() | _ANYWHERE))}"
        )
    return {**own, **changes}


def _refuse_options(config: MediaConfig) -> None:
    given = [
        spec.flag
        for spec in option_specs(MediaConfig)
        if getattr(config, spec.name) != spec.default
    ]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: with --language-only there are no pictures and videos; leave "
            "one of them out"
        )


def build_fetcher(config: MediaConfig) -> Fetcher:
    folder = config.allowed_local_media_path
    return Fetcher(
        limits=build_limits(config),
        local_folder=None if folder is None else Path(folder),
        allowed=config.domains,
    )
