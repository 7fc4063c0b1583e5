"""Page copies that only those can read who have the key: AES-GCM around any storage."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sapwood.base.errors import ConfigError
from sapwood.memory.storage.interface import PageStorage

NONCE_BYTES = 12
TAG_BYTES = 16


class SealedStorage:
    """A PageStorage (interface.py) that gives another one only sealed copies.

    A copy is sealed together with its name, so that one cannot stand for another. Whatever was not
    sealed with the key is a miss."""

    def __init__(self, storage: PageStorage, key: str) -> None:
        """key  64 hexadecimal digits; ConfigError if it is not"""
        try:
            secret = bytes.fromhex(key)
        except ValueError:
            secret = b""
        if len(secret) != 32:
            raise ConfigError("encryption_key must have 64 hexadecimal digits (AES-256)")
        self._storage = storage
        self._cipher = AESGCM(secret)

    def batch_exists(self, keys: Sequence[str]) -> int:
        return self._storage.batch_exists(keys)

    def batch_get(self, keys: Sequence[str], into: Sequence[memoryview]) -> int:
        sealed = [memoryview(bytearray(NONCE_BYTES + len(view) + TAG_BYTES)) for view in into]
        count = self._storage.batch_get(keys, sealed)
        for at, (key, box, view) in enumerate(
            zip(keys[:count], sealed[:count], into[:count], strict=True)
        ):
            try:
                view[:] = self._cipher.decrypt(box[:NONCE_BYTES], box[NONCE_BYTES:], key.encode())
            except InvalidTag:
                return at
        return count

    def batch_set(self, keys: Sequence[str], values: Sequence[memoryview]) -> int:
        boxes = []
        for key, value in zip(keys, values, strict=True):
            nonce = os.urandom(NONCE_BYTES)
            boxes.append(memoryview(nonce + self._cipher.encrypt(nonce, value, key.encode())))
        return self._storage.batch_set(keys, boxes)

    def clear(self) -> None:
        self._storage.clear()

    def close(self) -> None:
        self._storage.close()
