"""How much a picture or video may be, whatever it claims."""

from __future__ import annotations

import msgspec

MIB = 2**20


class MediaLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits that hold for each medium by itself.

    max_image_bytes, max_video_bytes, max_audio_bytes  of the file, before it is decoded
    max_pixels      of a picture or of one frame, as the file's header claims
    max_audio_seconds  of a sound
    max_frames      frames of a video that are decoded, of which the family then takes its own
    max_redirects   of a URL
    connect_s, read_s  waiting for a server's connection, and for its next piece
    prepare_s       decoding and preparing
    audio_prepare_s  the same for a sound, which may be hours long
    memory_bytes    that preparing may take besides what its process has at the start
    """

    max_image_bytes: int = 25 * MIB
    max_video_bytes: int = 200 * MIB
    max_audio_bytes: int = 200 * MIB
    max_audio_seconds: float = 7200.0
    max_pixels: int = 89_478_485
    max_frames: int = 20_000
    max_redirects: int = 3
    connect_s: float = 5.0
    read_s: float = 5.0
    prepare_s: float = 10.0
    audio_prepare_s: float = 60.0
    memory_bytes: int = 2048 * MIB

    def max_bytes(self, kind: str) -> int:
        if kind == "audio":
            return self.max_audio_bytes
        return self.max_video_bytes if kind == "video" else self.max_image_bytes

    def seconds_for(self, kind: str) -> float:
        """How long preparing may take."""
        return self.audio_prepare_s if kind == "audio" else self.prepare_s
