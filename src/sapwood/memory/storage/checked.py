"""A page copy together with its checksum, for storages that keep values under names."""

from __future__ import annotations

import struct
import zlib

CHECKSUM = struct.Struct("<I")


def checked(value: memoryview) -> bytes:
    """What is stored of a copy."""
    return CHECKSUM.pack(zlib.crc32(value)) + value


def checked_size(num_bytes: int) -> int:
    """Of a copy of so many bytes."""
    return CHECKSUM.size + num_bytes


def taken(stored: bytes | bytearray | memoryview, into: memoryview) -> bool:
    """Whether that is a whole copy; then its bytes are in `into`."""
    if len(stored) != checked_size(len(into)):
        return False
    content = memoryview(stored)[CHECKSUM.size :]
    if CHECKSUM.unpack_from(stored)[0] != zlib.crc32(content):
        return False
    into[:] = content
    return True
