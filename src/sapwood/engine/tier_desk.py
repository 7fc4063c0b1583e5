"""Orders about the storage tier while the engine serves: attach, detach, clear, status."""

from __future__ import annotations

import json
from dataclasses import replace

from sapwood.base.errors import ConfigError
from sapwood.engine.tiers import CacheTiers
from sapwood.memory.storage.interface import StorageUnavailable
from sapwood.schema.config.tiers import (
    SECRET_SETTINGS,
    PrefetchPolicy,
    TiersConfig,
    WritePolicy,
)
from sapwood.schema.request import SteerTiers

NO_HOST = (
    "this server has no host tier, behind which a storage lies; start it with "
    "--enable-hierarchical-cache"
)
BUSY = "requests are open, so the storage was not changed; try again when idle"
AT_START_ONLY = (
    "the storage dynamic runs code that it names, so it can only be given when the server starts"
)


class TierDesk:
    """Carries such orders out. A storage changes only while no request is open."""

    def __init__(self, tiers: CacheTiers | None, config: TiersConfig) -> None:
        """tiers: None: there are none"""
        self._tiers = tiers
        self._extra = config.hicache_storage_backend_extra_config

    def steer(self, message: SteerTiers, *, is_idle: bool) -> tuple[bool, str]:
        """(whether it is done, what there is to say). A status is JSON."""
        if self._tiers is None or self._tiers.stored is None:
            return False, NO_HOST
        if message.action == "status":
            return True, self._status()
        if not is_idle:
            return False, BUSY
        try:
            match message.action:
                case "attach":
                    return True, self._attach(message)
                case "detach":
                    return True, self._detach()
                case "clear":
                    return True, self._clear()
        except ConfigError as error:
            return False, error.message
        except StorageUnavailable as error:
            return False, str(error)
        raise AssertionError(f"unknown action {message.action!r}")

    def _status(self) -> str:
        tiers = self._tiers
        assert tiers is not None
        assert tiers.stored is not None
        return json.dumps(
            {
                "hicache_storage_backend": tiers.stored.backend,
                "hicache_storage_backend_extra_config": _without_secrets(self._extra),
                "hicache_storage_prefetch_policy": tiers.stored.rules.policy,
                "hicache_write_policy": tiers.host.policy,
            }
        )

    def _attach(self, message: SteerTiers) -> str:
        tiers = self._tiers
        assert tiers is not None
        stored = tiers.stored
        assert stored is not None
        asked = TiersConfig(
            enable_hierarchical_cache=True,
            hicache_storage_backend=message.backend,
            hicache_storage_prefetch_policy=message.prefetch_policy or stored.rules.policy,
            hicache_write_policy=message.write_policy or tiers.host.policy,
            hicache_storage_backend_extra_config=message.extra,
        )
        if message.backend == "dynamic":
            raise ConfigError(AT_START_ONLY)
        if stored.backend is not None and stored.backend != message.backend:
            raise ConfigError(
                f"the storage {stored.backend} is attached; detach it before {message.backend}"
            )
        done = "is attached already; the policies are as asked"
        if stored.backend is None:
            assert message.backend is not None
            stored.attach(message.backend, asked.extra)
            self._extra = message.extra
            stored.rules = asked.prefetch
            done = "is attached"
        stored.rules = replace(
            stored.rules, policy=PrefetchPolicy(asked.hicache_storage_prefetch_policy)
        )
        tiers.host.policy = WritePolicy(asked.hicache_write_policy)
        return f"the storage {message.backend} {done}"

    def _detach(self) -> str:
        assert self._tiers is not None
        assert self._tiers.stored is not None
        backend = self._tiers.stored.backend
        self._tiers.stored.detach()
        self._extra = None
        return (
            "no storage was attached" if backend is None else f"the storage {backend} is detached"
        )

    def _clear(self) -> str:
        assert self._tiers is not None
        stored = self._tiers.stored
        assert stored is not None
        if stored.backend is None:
            raise ConfigError("no storage is attached, so there is nothing to clear")
        stored.clear_storage()
        return f"the storage {stored.backend} is empty now"


def _without_secrets(extra: str | None) -> str | None:
    """Those settings, without keys and without addresses that may have a password."""
    if not extra:
        return None
    return json.dumps(
        {
            name: "***" if name in SECRET_SETTINGS else value
            for name, value in json.loads(extra).items()
        }
    )
