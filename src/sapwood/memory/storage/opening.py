"""Opens the storage that options or a request name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sapwood.base.errors import ConfigError
from sapwood.base.registry import Registry
from sapwood.memory.storage.interface import PageStorage, StorageUnavailable, StorageUser

if TYPE_CHECKING:
    from sapwood.memory.storage.file import FileMoves

GB = 10**9


def open_storage(backend: str, extra: Mapping[str, Any], user: StorageUser) -> PageStorage:
    """The storage of that name.

    extra   as TiersConfig.extra
    Raises  ConfigError if there is none, or it cannot be used
    """
    try:
        storage: PageStorage = STORAGES.get(backend)(extra, user)
    except StorageUnavailable as error:
        raise ConfigError(f"the storage {backend} cannot be used: {error}") from error
    key = extra.get("encryption_key")
    if key is None:
        return storage
    try:
        from sapwood.memory.storage.sealed import SealedStorage
    except ImportError as error:
        raise ConfigError(
            "encryption_key needs the package cryptography; pip install 'sapwood[tiers]'"
        ) from error
    return SealedStorage(storage, key)


def open_files(extra: Mapping[str, Any], user: StorageUser) -> PageStorage:
    return _files(extra, user)


def open_nixl(extra: Mapping[str, Any], user: StorageUser) -> PageStorage:
    from sapwood.memory.storage.nixl import NixlMoves

    return _files(extra, user, NixlMoves(extra.get("plugin", "auto")))


def _files(
    extra: Mapping[str, Any], user: StorageUser, moves: FileMoves | None = None
) -> PageStorage:
    from sapwood.memory.storage.file import FileStorage

    named = extra.get("directory")
    directory = user.default_directory if named is None else Path(named).expanduser()
    if directory.exists() and directory.stat().st_uid not in (os.getuid(), 0):
        raise ConfigError(
            f"{directory} belongs to another user, who could put other keys and values there; name "
            "a directory of yours"
        )
    max_gb = extra.get("max_gb")
    max_bytes = None if not max_gb else int(max_gb * GB)
    return FileStorage(directory, max_bytes=max_bytes, moves=moves)


def open_lmcache(extra: Mapping[str, Any], user: StorageUser) -> PageStorage:
    from sapwood.memory.storage.lmcache import LMCacheStorage

    return LMCacheStorage.of(extra)


def open_redis(extra: Mapping[str, Any], user: StorageUser) -> PageStorage:
    try:
        from sapwood.memory.storage.redis import RedisStorage
    except ImportError as error:
        raise ConfigError(
            "the storage redis needs the package redis; pip install 'sapwood[redis]'"
        ) from error
    return RedisStorage.of(extra)


def open_s3(extra: Mapping[str, Any], user: StorageUser) -> PageStorage:
    try:
        from sapwood.memory.storage.s3 import S3Storage
    except ImportError as error:
        raise ConfigError(
            "the storage s3 needs the package obstore; pip install 'sapwood[s3]'"
        ) from error
    return S3Storage.of(extra)


def open_mooncake(extra: Mapping[str, Any], user: StorageUser) -> PageStorage:
    # Else the library writes several lines to stderr for each connection.
    os.environ.setdefault("GLOG_minloglevel", "2")
    try:
        from sapwood.memory.storage.mooncake import MooncakeStorage
    except ImportError as error:
        raise ConfigError(
            "the storage mooncake needs the package mooncake-transfer-engine, or without CUDA "
            f"mooncake-transfer-engine-non-cuda: {error}"
        ) from error
    return MooncakeStorage.of(extra)


def open_plug_in(extra: Mapping[str, Any], user: StorageUser) -> PageStorage:
    from sapwood.memory.storage.dynamic import DynamicStorage

    return DynamicStorage.of(extra, user)


STORAGES: Registry[Any] = Registry(
    "storage",
    {
        "file": "sapwood.memory.storage.opening:open_files",
        "redis": "sapwood.memory.storage.opening:open_redis",
        "s3": "sapwood.memory.storage.opening:open_s3",
        "mooncake": "sapwood.memory.storage.opening:open_mooncake",
        "nixl": "sapwood.memory.storage.opening:open_nixl",
        "lmcache": "sapwood.memory.storage.opening:open_lmcache",
        "dynamic": "sapwood.memory.storage.opening:open_plug_in",
    },
)
