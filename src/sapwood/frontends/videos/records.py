"""What is kept of videos in a folder: a record each, and its files. Records outlive the server."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from sapwood.base.errors import NotFound
from sapwood.frontends.images.video_files import SUFFIXES
from sapwood.frontends.videos.protocol import Status, VideoFailure
from sapwood.schema.painting import PictureOptions

log = logging.getLogger(__name__)

_RECORD = re.compile(r"video_[0-9a-f]{32}\.json")
_OPEN = ("queued", "in_progress")
Variant = Literal["video", "thumbnail", "spritesheet"]
_ENDINGS = {"thumbnail": "thumbnail.webp", "spritesheet": "spritesheet.jpg"}


class VideoRecord(msgspec.Struct, kw_only=True):
    """A job. `options` are without its picture, which is a file of its own.

    num_bytes  of all its files
    """

    id: str
    model: str
    prompt: str
    options: PictureOptions
    fps: int
    num_frames: int
    size: str
    seed: int
    output_format: str
    created_at: float
    priority: int = 0
    timeout_s: float | None = None
    status: Status = "queued"
    progress: int = 0
    completed_at: float | None = None
    failure: VideoFailure | None = None
    remixed_from: str | None = None
    peak_bytes: int = 0
    paint_s: float = 0.0
    num_bytes: int = 0

    @property
    def is_open(self) -> bool:
        return self.status in _OPEN


class VideoStore:
    """Records by id, oldest first. Files are written before the record says that they are there.

    max_bytes  of all files; the oldest finished videos go first, but never the newest
    max_age_s  after which a finished video goes
    max_kept   records, the same
    now        seconds since 1970: ages go on while no server runs
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        max_age_s: float,
        max_kept: int,
        now: Callable[[], float],
    ) -> None:
        self._folder, self._now = folder, now
        self._max_bytes, self._max_kept = max_bytes, max_kept
        self.max_age_s = max_age_s
        self._records: dict[str, VideoRecord] = {}
        self.num_bytes = 0
        self._read()

    def __len__(self) -> int:
        return len(self._records)

    @property
    def num_open(self) -> int:
        return sum(record.is_open for record in self._records.values())

    def now_s(self) -> float:
        return self._now()

    def all(self) -> list[VideoRecord]:
        """Oldest first."""
        self._sweep()
        return list(self._records.values())

    def get(self, video_id: str) -> VideoRecord:
        """NotFound for a video that never was, or has been removed."""
        self._sweep()
        found = self._records.get(video_id)
        if found is None:
            raise NotFound(
                f"there is no video {video_id[:80]!r}; finished ones are kept for "
                f"{self.max_age_s:g} s (--stored-video-age), and at most {self._max_bytes} bytes "
                "of them (--max-stored-video-bytes)"
            )
        return found

    def add(self, record: VideoRecord, picture: bytes | None) -> None:
        """picture: the first frame, as PNG"""
        if picture is not None:
            self._write(self._picture(record.id), picture)
            record.num_bytes = len(picture)
        self.save(record)
        self._records[record.id] = record
        self.num_bytes += record.num_bytes
        self._sweep()

    def finish(self, record: VideoRecord, files: dict[Variant, bytes]) -> None:
        """Write a video's files, then what its record says now."""
        if record.id not in self._records:
            return
        for variant, content in files.items():
            self._write(self.path(record, variant), content)
            record.num_bytes += len(content)
            self.num_bytes += len(content)
        self.save(record)
        self._sweep()

    def save(self, record: VideoRecord) -> None:
        self._write(self._folder / f"{record.id}.json", msgspec.json.encode(record))

    def remove(self, video_id: str) -> None:
        record = self._records.pop(video_id)
        self.num_bytes -= record.num_bytes
        for path in self._files(record):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        for video_id in list(self._records):
            self.remove(video_id)

    def path(self, record: VideoRecord, variant: Variant) -> Path:
        ending = _ENDINGS.get(variant, SUFFIXES[record.output_format])
        return self._folder / f"{record.id}.{ending}"

    def picture(self, record: VideoRecord) -> bytes | None:
        """The first frame that the job was given, as PNG."""
        path = self._picture(record.id)
        return path.read_bytes() if path.is_file() else None

    def _picture(self, video_id: str) -> Path:
        return self._folder / f"{video_id}.first.png"

    def _files(self, record: VideoRecord) -> list[Path]:
        variants: tuple[Variant, ...] = ("video", "thumbnail", "spritesheet")
        own = [self.path(record, variant) for variant in variants]
        return [self._folder / f"{record.id}.json", self._picture(record.id), *own]

    def _write(self, path: Path, content: bytes) -> None:
        """Whole, or not at all."""
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(content)
        partial.replace(path)

    def _read(self) -> None:
        """Records of an earlier server; what it had not finished, has failed."""
        found: list[VideoRecord] = []
        for path in self._folder.glob("video_*.json"):
            try:
                record = msgspec.json.decode(path.read_bytes(), type=VideoRecord)
                if not _RECORD.fullmatch(path.name) or record.id != path.stem:
                    raise ValueError("its name is not its video's id")
                SUFFIXES[record.output_format]
            except (OSError, ValueError, KeyError) as error:
                log.warning("%s is no record of a video and stays as it is: %s", path, error)
                continue
            found.append(record)
        for record in sorted(found, key=lambda one: (one.created_at, one.id)):
            if record.is_open:
                record.status, record.completed_at = "failed", self._now()
                record.failure = VideoFailure(
                    code="interrupted",
                    message="the server ended before this video was finished; ask for it again",
                )
                self.save(record)
            elif record.status == "completed" and not self.path(record, "video").is_file():
                log.warning("the file of %s is gone, and so is its record", record.id)
                (self._folder / f"{record.id}.json").unlink(missing_ok=True)
                continue
            self._records[record.id] = record
            self.num_bytes += record.num_bytes
        for path in self._folder.glob("video_*.partial"):
            path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        now = self._now()
        done = [record for record in self._records.values() if not record.is_open]
        for place, record in enumerate(done):
            is_old = now - (record.completed_at or record.created_at) > self.max_age_s
            is_newest = place == len(done) - 1
            is_too_much = self.num_bytes > self._max_bytes or len(self._records) > self._max_kept
            if is_old or (is_too_much and not is_newest):
                self.remove(record.id)
