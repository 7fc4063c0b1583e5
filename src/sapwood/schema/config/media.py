"""Pictures and videos of requests: where they come from, how many, how large."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option

_KINDS = ("image", "video")


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaConfig:
    allowed_local_media_path: str | None = option(
        None,
        "Folder of the server whose pictures and videos requests may name, by file:// or by their "
        "absolute path; default: no files are read.",
    )
    allowed_media_domains: str = option(
        "",
        "Hosts, separated by commas, from which alone pictures and videos are fetched, also if "
        "they are inside the server's own network; default: all hosts of the public Internet.",
    )
    mm_max_concurrent_calls: int = option(
        32,
        "Requests whose pictures and videos are fetched and prepared at a time; others wait.",
        unit="requests",
    )
    mm_per_request_timeout: float = option(
        10.0,
        "A picture or video that is not fetched within this long, or then not prepared within as "
        "long again, is refused with 400.",
        unit="seconds",
    )
    limit_mm_data_per_request: str = option(
        '{"image": 16, "video": 1}',
        "JSON object of how many pictures and videos a request may bring; a kind that is left out "
        "has no limit of its own.",
    )
    max_image_bytes: int = option(
        25 * 2**20, "A picture whose file is larger is refused with 400.", unit="bytes"
    )
    max_video_bytes: int = option(
        200 * 2**20, "A video whose file is larger is refused with 400.", unit="bytes"
    )

    max_audio_bytes: int = option(
        200 * 2**20, "A sound whose file is larger is refused with 400.", unit="bytes"
    )
    max_audio_seconds: float = option(
        7200.0, "A sound that is longer is refused with 400.", unit="seconds"
    )

    mm_process_config: str = option(
        "{}",
        "JSON object of settings that take the place of those in the model's "
        'preprocessor_config.json: {"image": {"max_pixels": 1048576}, "video": {"fps": 1}}.',
    )

    def __post_init__(self) -> None:
        check_options(self)
        for name in (
            "mm_max_concurrent_calls",
            "max_image_bytes",
            "max_video_bytes",
            "max_audio_bytes",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be >= 1")
        if not 0 < self.mm_per_request_timeout < math.inf:
            raise ConfigError("--mm-per-request-timeout must be a finite number > 0")
        if not 0 < self.max_audio_seconds <= 86_400:
            raise ConfigError("--max-audio-seconds must be in (0, 86400]")
        folder = self.allowed_local_media_path
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"--allowed-local-media-path is {folder}, which is no folder")
        _ = self.most_of_kind, self.process_config

    @property
    def domains(self) -> frozenset[str]:
        hosts = (host.strip().rstrip(".").lower() for host in self.allowed_media_domains.split(","))
        return frozenset(host for host in hosts if host)

    @property
    def most_of_kind(self) -> dict[str, int]:
        """Kind -> how many of it a request may have."""
        text = self.limit_mm_data_per_request
        try:
            limits = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"--limit-mm-data-per-request is no JSON: {error}") from error
        if not isinstance(limits, dict) or not all(
            kind in _KINDS and type(most) is int and most >= 0 for kind, most in limits.items()
        ):
            raise ConfigError(
                f"--limit-mm-data-per-request is {text} but must be an object of image, video or "
                'both with whole numbers >= 0, such as {"image": 16, "video": 1}'
            )
        return limits

    @property
    def process_config(self) -> dict[str, dict[str, Any]]:
        """Kind -> settings that take the place of the model's own."""
        text = self.mm_process_config
        try:
            settings = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"--mm-process-config is no JSON: {error}") from error
        if not isinstance(settings, dict) or not all(
            kind in ("image", "video") and isinstance(of_kind, dict)
            for kind, of_kind in settings.items()
        ):
            raise ConfigError(
                f"--mm-process-config is {text[:200]} but must be an object of image, video or "
                'both with an object of settings, such as {"image": {"max_pixels": 1048576}}'
            )
        return settings
