"""What pipelines check alike of a request."""

from __future__ import annotations

from sapwood.base.errors import InvalidRequest
from sapwood.pipelines.interface import PictureRequest


def refuse_unused(
    request: PictureRequest,
    name: str,
    *,
    passes: int,
    max_pictures: int = 0,
    takes_mask: bool = False,
    takes_strength: bool = False,
    draws_videos: bool = False,
) -> None:
    """InvalidRequest, by name, for what a pipeline would not look at.

    passes        of a step: 2, if one of them has the negative prompt
    max_pictures  that it looks at
    """
    if request.negative_prompt and passes == 1:
        raise InvalidRequest(
            "a negative_prompt needs guidance by a second pass; ask for it with a "
            "true_cfg_scale, or guidance_scale where the model has no other, of more than 1",
            param="negative_prompt",
        )
    if len(request.images) > max_pictures:
        ability = (
            f"looks at {max_pictures} at most" if max_pictures else "draws from a prompt alone"
        )
        raise InvalidRequest(
            f"{len(request.images)} pictures were sent, but {name} {ability}", param="image"
        )
    if request.num_frames not in (None, 1) and not draws_videos:
        raise InvalidRequest(
            f"num_frames is {request.num_frames}, but {name} draws pictures, not videos",
            param="num_frames",
        )
    if request.guidance_scale_2 is not None and not draws_videos:
        raise InvalidRequest(f"{name} takes no guidance_scale_2", param="guidance_scale_2")
    if request.mask is not None and not takes_mask:
        raise InvalidRequest(f"{name} takes no mask", param="mask")
    if request.strength is not None and not takes_strength:
        raise InvalidRequest(f"{name} takes no strength", param="strength")


def text_length(request: PictureRequest, usual: int, most: int) -> int:
    """max_sequence_length of a request, or the usual one; InvalidRequest if it is impossible."""
    length = usual if request.max_sequence_length is None else request.max_sequence_length
    if not 1 <= length <= most:
        raise InvalidRequest(
            f"max_sequence_length must be 1..{most}, got {length}", param="max_sequence_length"
        )
    return length
