"""A server, or a program, that draws pictures with a diffusion model."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option

BACKENDS = ("auto", "sapwood", "diffusers")
DIT_QUANTIZATIONS = ("none", "fp8", "w8a16", "w8a8_int8", "w4a8")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_SIZES = re.compile(r"[1-9]\d{0,4}x[1-9]\d{0,4}(,[1-9]\d{0,4}x[1-9]\d{0,4}){0,15}")
_AT_LEAST_1 = (
    "max_running_pictures",
    "max_waiting_pictures",
    "max_step_tokens",
    "max_picture_pixels",
    "max_inference_steps",
    "max_pictures_per_request",
    "max_stored_picture_bytes",
    "max_video_frames",
    "max_video_pixels",
    "max_stored_video_bytes",
    "max_kept_videos",
)
_AT_LEAST_0 = ("text_cache_bytes", "picture_timeout", "stored_picture_age", "stored_video_age")


@dataclass(frozen=True, slots=True, kw_only=True)
class PaintingConfig:
    backend: str = option(
        "auto",
        "Who draws: sapwood; diffusers, the whole pipeline through that library, one picture at a "
        "time; auto: sapwood for the pipelines that it has, diffusers for others.",
        choices=BACKENDS,
    )
    dit_precision: str = option(
        "auto",
        "In which the transformer computes; auto: as its weights are stored.",
        choices=PRECISIONS,
    )
    dit_quantization: str = option(
        "none",
        "In how many bits the transformer's weights are kept; none: as --dit-precision says, or as "
        "the blocks of a GGUF file.",
        choices=DIT_QUANTIZATIONS,
    )
    dit_path: str | None = option(
        None,
        "The transformer's or U-Net's weights, instead of those in the folder: one safetensors "
        "file as ComfyUI has it, or a GGUF file. All else comes from the folder.",
    )
    text_encoder_precisions: str = option(
        "auto",
        "In which the text encoders compute, separated by commas, the first encoder first; the "
        "last one is also that of all further encoders; auto: as the weights are stored.",
    )
    vae_precision: str = option(
        "fp32",
        "In which pictures are encoded and decoded; auto: as the weights are stored.",
        choices=PRECISIONS,
    )
    vae_tiling: bool = option(
        False,
        "Decode large pictures tile by tile: less memory, and others are held up by a tile at "
        "most; the picture differs a little where tiles meet.",
    )
    warmup: bool = option(
        False,
        "Draw one step before the first request, in the pipeline's usual size or in those of "
        "--warmup-resolutions.",
    )
    warmup_resolutions: str | None = option(
        None, "Sizes of the warm-up, separated by commas, such as 512x512,1024x768."
    )
    lora_path: str | None = option(
        None,
        "A LoRA adapter that adds from the start: a safetensors file of diffusers, PEFT, kohya's "
        "trainer or ComfyUI, or its folder.",
    )
    lora_nickname: str = option("default", "What /v1/list_loras calls the one of --lora-path.")
    lora_scale: float = option(1.0, "How strongly the one of --lora-path adds.")
    max_running_pictures: int = option(16, "Pictures that have latents in memory at once.")
    max_waiting_pictures: int = option(256, "Pictures that may wait; more are refused with 503.")
    max_step_tokens: int = option(
        16384,
        "Tokens of all pictures of a step, text and both passes of guidance included; a picture "
        "that has more is computed alone.",
        unit="tokens",
    )
    text_cache_bytes: int = option(
        256 * 2**20, "Memory for vectors of prompts that may come again.", unit="bytes"
    )
    picture_timeout: float = option(
        0.0, "A picture that is not done after this long ends with 504; 0: never.", unit="seconds"
    )
    max_picture_pixels: int = option(
        4 * 2**20, "Width times height that a request may ask for, or bring.", unit="pixels"
    )
    max_inference_steps: int = option(200, "Steps that a request may ask for.")
    max_pictures_per_request: int = option(10, "The largest n of a request.")
    output_path: str | None = option(
        None,
        "Folder where pictures are kept for /v1/images/ID/content; default: one that goes with the "
        "server.",
    )
    stored_picture_age: float = option(
        3600.0, "A kept picture is removed after this long.", unit="seconds"
    )
    max_stored_picture_bytes: int = option(
        2**30, "Kept pictures together; the oldest are removed first.", unit="bytes"
    )

    max_video_frames: int = option(241, "Frames that a video may have.", unit="frames")
    max_video_pixels: int = option(
        128 * 2**20, "Width times height times frames that a video may have.", unit="pixels"
    )
    stored_video_age: float = option(
        86400.0,
        "A finished video is removed after this long. Videos are kept beside pictures "
        "(--output-path), and with --output-path or --state-dir they outlive the server.",
        unit="seconds",
    )
    max_stored_video_bytes: int = option(
        4 * 2**30,
        "Kept videos together; the oldest finished ones are removed first.",
        unit="bytes",
    )
    max_kept_videos: int = option(
        1000, "Videos that are kept and told of; the oldest finished ones are removed first."
    )

    def __post_init__(self) -> None:
        check_options(self)
        for name in (*_AT_LEAST_1, *_AT_LEAST_0):
            least = 1 if name in _AT_LEAST_1 else 0
            if getattr(self, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be >= {least}")
        if not math.isfinite(self.lora_scale):
            raise ConfigError(f"--lora-scale must be a finite number, got {self.lora_scale}")
        for precision in self.text_precisions:
            if precision not in PRECISIONS:
                raise ConfigError(
                    f"--text-encoder-precisions has {precision!r}, but must be made of "
                    f"{', '.join(PRECISIONS)}"
                )

        if self.warmup_resolutions is not None:
            if not self.warmup:
                raise ConfigError("--warmup-resolutions does nothing without --warmup")
            if not _SIZES.fullmatch(self.warmup_resolutions):
                raise ConfigError(
                    f"--warmup-resolutions is {self.warmup_resolutions[:100]!r}, but must be sizes "
                    "such as 512x512,1024x768"
                )

    @property
    def warmup_sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of each that --warmup-resolutions names"""
        sizes = (self.warmup_resolutions or "").split(",")
        return tuple((int(w), int(h)) for w, _, h in (size.partition("x") for size in sizes) if w)

    @property
    def text_precisions(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.text_encoder_precisions.split(","))
