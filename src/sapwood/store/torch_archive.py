"""Checks a zip archive of PyTorch before the archive is mapped or unpickled.

PyTorch takes tensors from the places in the archive's directory and in the headers of its members,
without comparing the two. The checks here rely on uncompressed members that follow one another.
Source: the zip format, PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.7 and 4.3.9.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

from sapwood.base.errors import WeightError

_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_HAS_DESCRIPTOR = 0x8
_DESCRIPTOR_BYTES = (16, 24)
"""Size of the descriptor after a member whose header was written first; 24 in zip64."""
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    ValueError,
    RuntimeError,
    ArithmeticError,
    LookupError,
)
"""The errors of zipfile on damaged archives."""
_MAX_PICKLE_BYTES = 1 << 28
"""The pickle has only names and shapes; the numbers are in members of their own."""


def storages_of(path: Path) -> dict[int, int] | None:
    """Check an archive. Returns the bytes of each storage by where they begin in the file; None if
    the file is no zip archive, and never was one.

    Raises WeightError, with file and member, if the archive is damaged."""
    try:
        with path.open("rb") as file:
            starts_as_one = file.read(len(_MAGIC)) == _MAGIC
            ends_as_one = zipfile.is_zipfile(file)
            if starts_as_one != ends_as_one:
                _fail(path, f"its {'end' if starts_as_one else 'beginning'} is missing")
            if not ends_as_one:
                return None
            with zipfile.ZipFile(file) as archive:
                members = sorted(archive.infolist(), key=lambda member: member.header_offset)
                _check_members(path, file, members, archive.start_dir)
                for member in members:
                    if not _is_storage(member.filename):
                        archive.read(member)  # compares its checksum
                return {
                    _start_of(path, file, member): member.file_size
                    for member in members
                    if _is_storage(member.filename)
                }
    except WeightError:
        raise
    except OSError as error:
        _fail(path, f"it cannot be read: {error.strerror}")
    except (
        zipfile.BadZipFile,
        EOFError,
        struct.error,
        ValueError,
        RuntimeError,
        ArithmeticError,
        LookupError,
    ) as error:
        _fail(path, f"{type(error).__name__}: {error}")


def _fail(path: Path, what: str) -> NoReturn:
    raise WeightError(
        f"{path} is not a whole PyTorch checkpoint ({what}); download the model again"
    )


def _is_storage(name: str) -> bool:
    """Whether the member NAME holds a tensor's numbers, as "archive/data/0" does."""
    return name.split("/")[1:2] == ["data"]


def _check_members(
    path: Path, file: BinaryIO, members: Sequence[zipfile.ZipInfo], directory_offset: int
) -> None:
    if len({member.filename for member in members}) != len(members):
        _fail(path, "its directory lists a file twice")
    next_offsets: tuple[int, ...] = (0,)
    for member in members:
        name = member.filename
        if member.header_offset not in next_offsets:
            _fail(path, f"{name} in it does not lie where the file before it ends")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            _fail(path, f"{name} in it is compressed")
        if not _is_storage(name) and member.file_size > _MAX_PICKLE_BYTES:
            _fail(path, f"{name} in it has {member.file_size} bytes, which is absurd")
        end = _start_of(path, file, member) + member.file_size
        has_descriptor = member.flag_bits & _HAS_DESCRIPTOR
        next_offsets = tuple(end + more for more in (_DESCRIPTOR_BYTES if has_descriptor else (0,)))
    if directory_offset not in next_offsets:
        _fail(path, "its directory does not begin where its last file ends")


def _start_of(path: Path, file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where the member's contents begin, as its own header says."""
    file.seek(member.header_offset)
    raw = file.read(_LOCAL_HEADER.size)
    if len(raw) < _LOCAL_HEADER.size:
        _fail(path, f"{member.filename} in it ends beyond the file")
    fields = _LOCAL_HEADER.unpack(raw)
    name_bytes, extra_bytes = int(fields[9]), int(fields[10])
    name = file.read(name_bytes)
    if fields[0] != _MAGIC or name != member.orig_filename.encode():
        _fail(path, f"{member.filename} in it has another name, or none, in its own header")
    return member.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
