"""Names the model of a configuration in which nobody has named one."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from sapwood.app.building.model_files import cache_of
from sapwood.schema.config.engine import EngineConfig
from sapwood.store import Progress, open_store
from sapwood.store.default_model import DEFAULT, choose_default
from sapwood.store.progress import Silent

_log = logging.getLogger(__name__)


def with_named_model(
    asked: EngineConfig, *, home: Path, progress: Progress | None = None
) -> EngineConfig:
    """The configuration with the default model's own name, which is fetched unless the cache has
    it; as it is if it names a model, or if there is a path called "default".

    Raises ModelSourceError if neither the preferred model nor the small one can be had.
    """
    if asked.model.model != DEFAULT or Path(DEFAULT).exists():
        return asked
    choice = choose_default(
        open_store(cache_of(asked.model, home)),
        offline=asked.model.offline,
        progress=progress or Silent(),
    )
    _log.info("The model is %s: %s", choice.name, choice.why)
    return replace(asked, model=replace(asked.model, model=choice.name))
