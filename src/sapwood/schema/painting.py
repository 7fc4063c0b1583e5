"""What is asked of an engine that draws pictures, and what it answers; no torch."""

from __future__ import annotations

from typing import Literal

import msgspec


class InputPicture(msgspec.Struct, frozen=True, kw_only=True):
    """A picture that a request brings.

    pixels  uint8 [height, width, 3], red, green, blue, row by row
    """

    width: int
    height: int
    pixels: bytes


class PictureOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a request says of its pictures; None: as the pipeline does it by default.

    width, height    in pixels
    guidance_scale   strength of guidance, as the pipeline understands it
    true_cfg_scale   guidance by a second pass, for pipelines whose guidance_scale is an input of
                     their transformer
    negative_prompt  what the pictures are to be led away from
    pictures         to begin from, to change or to look at
    mask             uint8 [height, width] of the first picture: 255 where it is to be drawn anew
    strength         0..1: how much of the first picture is replaced by noise
    num_frames       of a video
    guidance_scale_2  strength of guidance of the second transformer, where a pipeline has two
    """

    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    negative_prompt: str | None = None
    max_sequence_length: int | None = None
    pictures: tuple[InputPicture, ...] = ()
    mask: bytes | None = None
    strength: float | None = None
    num_frames: int | None = None
    guidance_scale_2: float | None = None


class Paint(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """One picture to draw.

    seed         of the noise: torch.Generator("cpu").manual_seed(seed)
    priority     larger goes first
    timeout_s    seconds from arrival until the picture must be there; None: no limit
    num_partial  pictures to show on the way, evenly over the steps
    """

    request_id: str
    prompt: str
    seed: int
    options: PictureOptions = PictureOptions()
    priority: int = 0
    timeout_s: float | None = None
    num_partial: int = 0


class StopPainting(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class DrainPainter(msgspec.Struct, frozen=True, tag=True):
    """No new requests; the engine ends after the open ones, or after `timeout_s`."""

    timeout_s: float


class GetPainterStatus(msgspec.Struct, frozen=True, tag=True):
    call_id: str


class LoraWish(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter that is to add to the weights.

    path    a file or its folder; None: as it was given before
    target  "all", or "transformer": the text encoders stay as they are
    """

    nickname: str
    path: str | None = None
    target: str = "all"
    strength: float = 1.0


class ChangeLoras(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A change that holds for pictures that come after it; those before are drawn first.

    kind      "set": `wishes` add, and no others; "merge": what was set is switched on; "unmerge":
              it is switched off
    strength  of all, for "merge"; None: as they were set
    """

    call_id: str
    kind: Literal["set", "merge", "unmerge"]
    wishes: tuple[LoraWish, ...] = ()
    target: str = "all"
    strength: float | None = None


class ListLoras(msgspec.Struct, frozen=True, tag=True):
    call_id: str


PainterInput = Paint | StopPainting | DrainPainter | GetPainterStatus | ChangeLoras | ListLoras


class LoadedLora(msgspec.Struct, frozen=True, kw_only=True):
    nickname: str
    path: str


class ActiveLora(msgspec.Struct, frozen=True, kw_only=True):
    """merged: whether it adds now"""

    nickname: str
    path: str
    target: str
    strength: float
    merged: bool


class LoraList(msgspec.Struct, frozen=True, kw_only=True):
    """active: by component, what adds to it now"""

    loaded_adapters: tuple[LoadedLora, ...]
    active: dict[str, tuple[ActiveLora, ...]]


class LorasAnswer(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What has come of ChangeLoras or ListLoras.

    refusal  why nothing was changed, with its HTTP status and field
    """

    call_id: str
    listing: LoraList
    refusal: str | None = None
    status: int = 400
    param: str | None = None


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """A picture, or the frames of a video, one after the other.

    pixels  uint8 [num_frames, height, width, channels]; 3 channels, or 4 with opacity
    """

    width: int
    height: int
    channels: int
    pixels: bytes
    num_frames: int = 1


class PaintProgress(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A step of the picture is done.

    partial  the picture as it is now, if the request wants one after this step
    """

    request_id: str
    step: int
    num_steps: int
    partial: Picture | None = None


class PaintDone(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The last message of a picture that was drawn.

    queue_s   seconds from arrival to the first step
    paint_s   seconds from arrival to this message
    peak_bytes  the most memory that the engine's process has had
    """

    request_id: str
    picture: Picture
    num_steps: int
    queue_s: float
    paint_s: float
    peak_bytes: int = 0


class PaintFailed(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The last message of a picture that was not drawn.

    kind     "refused": the request cannot be honoured; "aborted": nobody wants it any more;
             "late": it was not done in time; "failed": something on our side
    status   of HTTP
    """

    request_id: str
    kind: Literal["refused", "aborted", "late", "failed"]
    message: str
    status: int
    error_type: str
    param: str | None = None


PaintEvent = PaintProgress | PaintDone | PaintFailed


class PictureDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a request has where it says nothing; None: the pipeline does not tell."""

    width: int | None
    height: int | None
    num_inference_steps: int | None
    guidance_scale: float | None = None


class VideoDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a video has where a request says nothing.

    fps         frames per second that the model was trained on
    frame_step  by which the number of frames grows, from 1 on
    """

    num_frames: int
    fps: int
    frame_step: int


class PipelineTraits(msgspec.Struct, frozen=True, kw_only=True):
    """What may be asked of a loaded pipeline.

    size_multiple       pixels by which a picture's sides can grow
    max_input_pictures  that a request may bring; 0: the pipeline draws from a prompt alone
    needs_picture       whether a request must bring one
    takes_mask          whether the first picture may have a mask
    draws_over_picture  whether a picture without a size gets that of the first one that the request
                        brings
    max_together        pictures that may be drawn at once; None: as many as memory holds
    video               of a pipeline that draws videos; None: it draws pictures
    """

    defaults: PictureDefaults
    size_multiple: int
    max_input_pictures: int = 0
    needs_picture: bool = False
    takes_mask: bool = False
    draws_over_picture: bool = False
    max_together: int | None = None
    video: VideoDefaults | None = None


class ComponentFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a pipeline: its folder, its class, and its weights.

    precision   in which the weights are kept in memory; "": it has none
    file_bytes  of the weights as they are stored
    num_bytes   of the weights in memory
    """

    name: str
    class_name: str
    precision: str = ""
    file_bytes: int = 0
    num_bytes: int = 0


class PainterReady(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The first message of an engine that draws.

    pipeline    the class that model_index.json names
    backend     "sapwood", or "diffusers" if the pipeline runs through that library
    notes       one line for each choice that was resolved, with its reason
    startup_s   seconds from the process's start to this message
    load_s      seconds of these that went into loading the weights
    """

    pipeline: str
    backend: str
    traits: PipelineTraits
    components: tuple[ComponentFacts, ...]
    notes: tuple[str, ...]
    startup_s: float = 0.0
    load_s: float = 0.0


class PainterFatal(msgspec.Struct, frozen=True, tag=True):
    """The last message of an engine that cannot go on."""

    reason: str


class PainterStatus(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Counters from the engine's start, and gauges.

    num_steps           calls of the transformer
    num_rows            passes in all of them
    num_trajectory_steps  steps of all pictures; more than num_steps where pictures shared calls
    num_text_hits       texts whose vectors were kept
    text_bytes          of the vectors that are kept
    peak_bytes          the most memory that the engine's process has had
    """

    call_id: str
    num_waiting: int
    num_denoising: int
    num_decoding: int
    num_steps: int
    num_rows: int
    num_trajectory_steps: int
    num_done: int
    num_failed: int
    num_aborted: int
    num_late: int
    num_refused: int
    num_text_hits: int
    num_text_misses: int
    text_bytes: int
    resident_bytes: int = 0
    peak_bytes: int = 0


PainterOutput = (
    PainterReady
    | PainterFatal
    | PainterStatus
    | PaintProgress
    | PaintDone
    | PaintFailed
    | LorasAnswer
)
