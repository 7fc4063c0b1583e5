"""Where KV goes that the pool has no room for: the memory of the host, and storage."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option


class WritePolicy(StrEnum):
    """When a page is copied to the host.

    WRITE_THROUGH            when it is computed
    WRITE_THROUGH_SELECTIVE  when a request reuses it for the first time
    WRITE_BACK               when the pool gives it away
    """

    WRITE_THROUGH = "write_through"
    WRITE_THROUGH_SELECTIVE = "write_through_selective"
    WRITE_BACK = "write_back"


MOST_GIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TiersConfig:
    """Tiers of the KV cache behind the pool in which steps compute."""

    enable_hierarchical_cache: bool = option(
        False,
        "Keep prefixes that the KV pool has no room for in the host's memory, and fetch them from "
        "there instead of computing them again: pages, windows and states of all models.",
    )
    hicache_ratio: float = option(
        2.0, "Size of the host's pool of prefixes, relative to the KV pool."
    )
    hicache_size: float = option(
        0, "Size of the host's pool of prefixes on each rank; overrides --hicache-ratio.", unit="GB"
    )
    hicache_write_policy: str = option(
        "write_through",
        "When KV is copied to the host: write_through, when it is computed; "
        "write_through_selective, when a request reuses it for the first time; write_back, when "
        "the KV pool gives it away.",
        choices=tuple(WritePolicy),
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not 0.0 < self.hicache_ratio <= 10_000:
            raise ConfigError(
                f"--hicache-ratio is {self.hicache_ratio} but must be above 0, up to 10000"
            )
        if not 0.0 <= self.hicache_size <= MOST_GIB:
            raise ConfigError(
                f"--hicache-size is {self.hicache_size} but must be from 0 to {MOST_GIB} gigabytes"
            )

    @property
    def given_in_vain(self) -> list[str]:
        """Flags that were given though there are no tiers."""
        if self.enable_hierarchical_cache:
            return []
        return [
            "--" + one.name.replace("_", "-")
            for one in fields(self)
            if getattr(self, one.name) != one.default
        ]

    @property
    def write_policy(self) -> WritePolicy:
        return WritePolicy(self.hicache_write_policy)
