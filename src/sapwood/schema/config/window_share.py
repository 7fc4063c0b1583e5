"""How large the pools of windows are, if it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.base.errors import ConfigError
from sapwood.schema.cache import CacheGroup, CacheKind


def check_window_share(
    share: float | None, groups: Sequence[CacheGroup], *, model: str
) -> float | None:
    """The share of --swa-full-tokens-ratio; ConfigError if the model has no use for one.

    groups  of the model, for the context that is served
    """
    if share is None or any(group.kind is CacheKind.WINDOW for group in groups):
        return share
    raise ConfigError(
        f"--swa-full-tokens-ratio is {share}, but no layer of {model} has a window shorter than "
        "the context; leave the option out"
    )
