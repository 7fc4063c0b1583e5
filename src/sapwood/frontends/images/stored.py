"""Pictures that can be fetched by id: a folder with a limit of age and of bytes."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from sapwood.base.clock import Clock
from sapwood.base.errors import NotFound


@dataclass(frozen=True, slots=True)
class StoredPicture:
    path: Path
    media_type: str
    num_bytes: int
    stored_s: float


class PictureStore:
    """Knows the pictures that it has stored itself; files of earlier servers stay as they are.

    max_bytes  of all pictures; the oldest are removed first, but never the newest
    max_age_s  after which a picture is removed
    """

    def __init__(self, folder: Path, *, max_bytes: int, max_age_s: float, clock: Clock) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock = clock
        self._pictures: OrderedDict[str, StoredPicture] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._pictures)

    def put(self, content: bytes, suffix: str, media_type: str) -> str:
        """Store a picture; its id."""
        picture_id = f"img_{uuid.uuid4().hex}"
        path = self._folder / f"{picture_id}.{suffix}"
        path.write_bytes(content)
        self._pictures[picture_id] = StoredPicture(
            path, media_type, len(content), self._clock.now_s()
        )
        self.num_bytes += len(content)
        self._sweep()
        return picture_id

    def get(self, picture_id: str) -> StoredPicture:
        """NotFound for a picture that never was, or has been removed."""
        self._sweep()
        found = self._pictures.get(picture_id)
        if found is None:
            raise NotFound(
                f"there is no picture {picture_id[:80]!r}; pictures are kept for "
                f"{self._max_age_s:g} s (--stored-picture-age), and at most {self._max_bytes} "
                "bytes of them (--max-stored-picture-bytes)"
            )
        return found

    def clear(self) -> None:
        """Remove all pictures."""
        while self._pictures:
            _, picture = self._pictures.popitem(last=False)
            picture.path.unlink(missing_ok=True)
        self.num_bytes = 0

    def _sweep(self) -> None:
        while self._pictures:
            picture_id, oldest = next(iter(self._pictures.items()))
            is_old = self._clock.now_s() - oldest.stored_s > self._max_age_s
            is_too_much = self.num_bytes > self._max_bytes and len(self._pictures) > 1
            if not is_old and not is_too_much:
                return
            del self._pictures[picture_id]
            self.num_bytes -= oldest.num_bytes
            oldest.path.unlink(missing_ok=True)
