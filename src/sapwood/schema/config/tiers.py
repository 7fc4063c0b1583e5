"""Where KV goes that the pool has no room for: the memory of the host, and storage."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

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


class PrefetchPolicy(StrEnum):
    """How long a request waits for pages from the storage.

    BEST_EFFORT    not at all: it takes what is there when it is its turn
    WAIT_COMPLETE  until all are there
    TIMEOUT        so long, but no longer than a time that grows with its pages
    """

    BEST_EFFORT = "best_effort"
    WAIT_COMPLETE = "wait_complete"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchRules:
    """When pages are read ahead from the storage, and how long a request waits for them.

    threshold  tokens that must be missing
    base_s, per_ki_token_s  the longest wait, with the policy TIMEOUT
    """

    policy: PrefetchPolicy
    threshold: int = 256
    base_s: float = 1.0
    per_ki_token_s: float = 0.25

    def wait_s(self, num_tokens: int) -> float:
        """How long a request waits at most for the pages of so many tokens."""
        match self.policy:
            case PrefetchPolicy.BEST_EFFORT:
                return 0.0
            case PrefetchPolicy.WAIT_COMPLETE:
                return math.inf
            case PrefetchPolicy.TIMEOUT:
                return self.base_s + self.per_ki_token_s * num_tokens / 1024


MOST_GIB = 1 << 20

_SHARED = "take redis or s3 to share pages between machines, or dynamic with a class that calls it"
_OTHER_STORAGES = {
    "hf3fs": "3FS is not called by sapwood itself; take nixl with its plug-in 3FS, or "
    "mount it and take file with a directory there",
    "aibrix": f"AIBrix's cache is not called by sapwood; {_SHARED}",
    "eic": f"EIC is not called by sapwood; {_SHARED}",
    "valkey": "Valkey speaks Redis's protocol; take redis with its url",
}
"""Storages that SGLang or others have, each with the reason and the way out."""


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
        0.0,
        "Size of the host's pool of prefixes on each rank; overrides --hicache-ratio.",
        unit="GB",
    )
    hicache_write_policy: str = option(
        "write_through",
        "When KV is copied to the host: write_through, when it is computed; "
        "write_through_selective, when a request reuses it for the first time; write_back, when "
        "the KV pool gives it away.",
        choices=tuple(WritePolicy),
    )
    hicache_storage_backend: str | None = option(
        None,
        "Where the host's copies outlive the server, and from where other servers take them: file, "
        "in a directory; redis, on a server of Redis or Valkey; s3, in a bucket of S3 or of a "
        "server with its protocol; mooncake, in the memory of all machines of Mooncake's store; "
        "nixl, in a directory that NIXL's plug-ins read and write; lmcache, on LMCache's server; "
        "dynamic, by a class of yours. Default: nowhere.",
        choices=("file", "redis", "s3", "mooncake", "nixl", "lmcache", "dynamic"),
        lacking=_OTHER_STORAGES,
    )
    hicache_storage_prefetch_policy: str = option(
        "timeout",
        "How long a request waits for pages from the storage: best_effort, not at all; "
        "wait_complete, until all are there; timeout, no longer than a time that grows with them.",
        choices=tuple(PrefetchPolicy),
    )
    hicache_storage_backend_extra_config: str | None = option(
        None,
        "Settings of the storage, as JSON: prefetch_threshold, prefetch_timeout_base and "
        "prefetch_timeout_per_ki_token; directory and max_gb of file; url, prefix, ttl_s and "
        "timeout_s of redis; bucket, endpoint_url, region, access_key_id, secret_access_key, "
        "prefix and timeout_s of s3; master_server_address, local_hostname, metadata_server, "
        "protocol, device_name, global_segment_size, prefix and timeout_s of mooncake; "
        "directory, max_gb and plugin of nixl; url, prefix and timeout_s of lmcache; "
        "backend_name, module_path and class_name of dynamic; "
        "encryption_key of all.",
        secret=True,
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

        check_storage(self)

    @property
    def prefetch(self) -> PrefetchRules:
        extra = self.extra
        return PrefetchRules(
            policy=PrefetchPolicy(self.hicache_storage_prefetch_policy),
            threshold=int(extra.get("prefetch_threshold", 256)),
            base_s=float(extra.get("prefetch_timeout_base", 1.0)),
            per_ki_token_s=float(extra.get("prefetch_timeout_per_ki_token", 0.25)),
        )

    @property
    def extra(self) -> dict[str, Any]:
        """Of --hicache-storage-backend-extra-config."""
        return extra_of(self.hicache_storage_backend_extra_config)

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


_FLAG = "--hicache-storage-backend-extra-config"
_NUMBERS = {
    "prefetch_threshold": 1e9,
    "prefetch_timeout_base": 3600.0,
    "prefetch_timeout_per_ki_token": 3600.0,
    "max_gb": 1e9,
    "ttl_s": 1e9,
    "timeout_s": 3600.0,
}
"""What is a number in the JSON, and the largest."""
SECRET_SETTINGS = frozenset({"encryption_key", "url", "access_key_id", "secret_access_key"})
"""What nobody is shown; an address may have a password."""
_TEXTS = {
    "directory", "url", "prefix", "backend_name", "module_path", "class_name", "encryption_key",
    "bucket", "endpoint_url", "region", "access_key_id", "secret_access_key",
    "master_server_address", "local_hostname", "metadata_server", "protocol", "device_name",
    "global_segment_size", "plugin",
}  # fmt: skip
_LMCACHE_PREFIX = r"[A-Za-z0-9._:-]{1,64}"
_SHAPES = {
    "bucket": r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}",
    "endpoint_url": r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[A-Za-z0-9._/-]*)?",
    "region": r"[A-Za-z0-9-]{1,64}",
    "access_key_id": r"[\x21-\x7e]{1,256}",
    "secret_access_key": r"[\x21-\x7e]{1,256}",
    "master_server_address": r"([A-Za-z0-9.-]{1,255}|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}",
    "local_hostname": r"[A-Za-z0-9.:-]{1,255}",
    "metadata_server": r"P2PHANDSHAKE|(https?|etcd|redis)://[A-Za-z0-9.:/_-]{1,1024}",
    "protocol": r"[a-z0-9_]{1,32}",
    "plugin": r"auto|3FS|POSIX|GDS_MT|GDS",
    "device_name": r"[A-Za-z0-9_.,:-]{1,1024}",
    "global_segment_size": r"[0-9]{1,6}(\.[0-9]{1,6})?(gb|GB)",
}
"""What some texts must look like."""


def extra_of(text: str | None) -> dict[str, Any]:
    """What that JSON says; ConfigError if it is none, or says what nobody knows."""
    if not text:
        return {}
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(f"{_FLAG} is no JSON") from None
    if not isinstance(told, dict):
        raise ConfigError(f'{_FLAG} must be a JSON object, such as {{"max_gb": 10}}')
    for name, value in told.items():
        if name in _NUMBERS:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value <= _NUMBERS[name]:
                raise ConfigError(
                    f"{_FLAG} has {name} {str(value)[:40]!r} but must have a number from 0 to "
                    f"{_NUMBERS[name]:g}"
                )
        elif name in _TEXTS:
            if not isinstance(value, str) or not value or "\0" in value or len(value) > 4096:
                raise ConfigError(f"{_FLAG} has a {name} that is no text")
            if name in _SHAPES and not re.fullmatch(_SHAPES[name], value):
                shown = "" if name in SECRET_SETTINGS else f", {value[:80]!r}"
                raise ConfigError(f"{_FLAG} has a {name} that is none{shown}")
        elif name == "hicache_storage_pass_prefix_keys" and value is False:
            continue
        elif name not in _CLASS_SETTINGS and told.get("class_name") is None:
            known = ", ".join(sorted({*_NUMBERS, *_TEXTS}))
            raise ConfigError(f"{_FLAG} has {name[:80]!r}, but knows only {known}")
    return told


_CLASS_SETTINGS = frozenset({"interface_v1"})
"""What SGLang's own extra configuration may have besides, and changes nothing."""


def check_storage(config: TiersConfig) -> None:
    """ConfigError if the options of the storage contradict each other."""
    extra, backend = config.extra, config.hicache_storage_backend
    if backend == "dynamic" and not (extra.get("module_path") and extra.get("class_name")):
        raise ConfigError(
            f"the storage backend dynamic needs module_path and class_name in {_FLAG}"
        )
    if backend == "s3" and not extra.get("bucket"):
        raise ConfigError(f'the storage backend s3 needs its bucket in {_FLAG}: {{"bucket": "…"}}')
    if backend == "mooncake" and not extra.get("master_server_address"):
        raise ConfigError(
            f"the storage backend mooncake needs its master_server_address in {_FLAG}: "
            '{"master_server_address": "host:50051"}'
        )
    if backend == "lmcache" and not extra.get("url"):
        raise ConfigError(
            f'the storage backend lmcache needs its url in {_FLAG}: {{"url": "lm://host:65432"}}'
        )
    if backend == "lmcache" and not re.fullmatch(_LMCACHE_PREFIX, extra.get("prefix", "-")):
        raise ConfigError(
            f"{_FLAG} has a prefix that LMCache's keys have no room for: take up to 64 of the "
            "characters A to Z, a to z, 0 to 9, '.', '_', ':' and '-'"
        )
    if backend == "redis" and not extra.get("url"):
        raise ConfigError(
            f'the storage backend redis needs its url in {_FLAG}: {{"url": "redis://…"}}'
        )
