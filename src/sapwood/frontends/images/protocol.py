"""The bodies of /v1/images/*: OpenAI's fields, and those of SGLang's diffusion server."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from sapwood.schema.fields import FieldTable, Int64, NotOffered

Scale = Annotated[float, msgspec.Meta(ge=0.0, le=1000.0)]
Steps = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]

OutputFormat = Literal["png", "jpeg", "webp"]


class PictureFields(msgspec.Struct, frozen=True, kw_only=True):
    """What generations and edits share.

    size                 "auto", or width x height in pixels
    output_compression   quality of jpeg and webp, 0 to 100
    partial_images       pictures to show on the way, for stream
    seed                 of the first picture; the others have seed + 1, …; null: a random one
    priority             larger goes first
    timeout              seconds until the pictures must be there; else 504
    """

    prompt: str
    model: str | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] = 1
    size: str = "auto"
    response_format: Literal["url", "b64_json"] = "url"
    output_format: OutputFormat = "png"
    output_compression: Annotated[int, msgspec.Meta(ge=0, le=100)] | None = None
    stream: bool = False
    partial_images: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0
    seed: Seed | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Scale | None = None
    true_cfg_scale: Scale | None = None
    negative_prompt: str | None = None
    max_sequence_length: Annotated[int, msgspec.Meta(ge=1, le=4096)] | None = None
    priority: Int64 = 0
    timeout: Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] | None = None


class GenerationRequest(PictureFields, frozen=True, kw_only=True):
    pass


class EditRequest(PictureFields, frozen=True, kw_only=True):
    """strength: 0..1, how much of the first picture is replaced by noise"""

    strength: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None


_CHANGES_NOTHING = {
    "quality": "num_inference_steps says how much work goes into a picture",
    "user": "nothing is kept by user",
    "moderation": "nothing is moderated",
}
_NOT_OFFERED = {
    "background": NotOffered(
        why="whether a picture has opacity is the model's matter", idle=("auto", "opaque")
    ),
    "style": NotOffered(why="say it in the prompt", idle=("vivid",)),
    "input_fidelity": NotOffered(why="the pipeline says how it looks at pictures", idle=("low",)),
    "generator_device": NotOffered(
        why="noise is drawn on the CPU, so that a seed gives the same picture everywhere",
        idle=("cpu",),
    ),
    "enable_teacache": NotOffered(why="every step is computed"),
    "diffusers_kwargs": NotOffered(why="only the fields of this list reach the pipeline"),
}

_HIDDEN_DEFAULTS: dict[str, tuple[object, ...]] = {"size": ("",)}

GENERATION_FIELDS: FieldTable[GenerationRequest] = FieldTable(
    title="POST /v1/images/generations",
    shape=GenerationRequest,
    changes_nothing=_CHANGES_NOTHING,
    not_offered=_NOT_OFFERED,
    left_out=_HIDDEN_DEFAULTS,
)
EDIT_FIELDS: FieldTable[EditRequest] = FieldTable(
    title="POST /v1/images/edits (multipart, besides image and mask)",
    shape=EditRequest,
    changes_nothing=_CHANGES_NOTHING,
    not_offered=_NOT_OFFERED
    | {
        "url": NotOffered(why="send the picture itself as image"),
        "url[]": NotOffered(why="send the pictures themselves as image[]"),
        "num_frames": NotOffered(why="this server draws pictures", idle=(1, "1")),
    },
    left_out=_HIDDEN_DEFAULTS,
)


class PictureAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One picture; seed is the one that it was drawn with."""

    seed: int
    b64_json: str | None = None
    url: str | None = None
    file_path: str | None = None
    revised_prompt: str | None = None


class PicturesAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """id: of the first picture, for /v1/images/ID/content"""

    id: str
    created: int
    data: list[PictureAnswer]
    output_format: str
    size: str
    peak_memory_mb: float
    inference_time_s: float


class StoredPictureAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A picture that is kept for /v1/images/ID/content."""

    id: str
    media_type: str


EDIT_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["prompt", "image"],
    "properties": {
        "image": {"type": "string", "format": "binary"},
        "image[]": {"type": "array", "items": {"type": "string", "format": "binary"}},
        "mask": {"type": "string", "format": "binary"},
        **{name: {"type": "string"} for name in EditRequest.__struct_fields__},
    },
}
