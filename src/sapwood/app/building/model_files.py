"""The files of the model that the options name, and their end."""

from __future__ import annotations

import logging
from pathlib import Path

from sapwood.base.errors import ConfigError
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.model import ModelConfig
from sapwood.store import ModelFiles, fetch_model
from sapwood.store.overridden import with_changed_config
from sapwood.store.progress import Progress

log = logging.getLogger(__name__)


def open_model(
    model: ModelConfig, *, home: Path, is_verified: bool = False, progress: Progress | None = None
) -> ModelFiles:
    """The model's files, fetched unless they are cached, with the config.json that is asked for.

    home         directory of cached models, unless --download-dir names another
    is_verified  whether the files have been compared with their checksums already, if they must be
    Raises       StartupError, with the reason, if the model cannot be had
    """
    files = fetch_model(
        model.model,
        home=cache_of(model, home),
        revision=model.revision,
        load_format=model.load_format,
        offline=model.offline,
        checksum=None if is_verified else model.model_checksum,
        progress=progress,
        mmproj=model.mmproj,
    )
    changes = model.config_changes
    return with_changed_config(files, changes, home) if changes else files


def cache_of(model: ModelConfig, home: Path) -> Path:
    """Where models are cached: below `home`, unless --download-dir names another directory."""
    return Path(model.download_dir).expanduser().absolute() if model.download_dir else home


def check_deletable(engine: EngineConfig, *, restarts: bool) -> None:
    """ConfigError if the model's weight files must not be deleted, or are needed again."""
    if not Path(engine.model.model).exists():
        raise ConfigError(
            "--delete-ckpt-after-loading deletes the files of a model that is given as a path; "
            f"{engine.model.model} is in the cache: see `sapwood rm`"
        )
    if restarts:
        raise ConfigError(
            "--delete-ckpt-after-loading does not go together with --restart-engine, which loads "
            "the weights again; leave one of them out"
        )


def delete_weights(files: ModelFiles) -> None:
    """Delete the weight files; the configuration and the tokenizer stay."""
    for path in files.weights:
        path.unlink(missing_ok=True)
    log.info("deleted %d weight files of %s", len(files.weights), files.path)
