"""CLIP's image encoder, whose states tell a transformer what a video begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sapwood.layers.build import Build
from sapwood.layers.targets import Target
from sapwood.models.hf_fields import integer
from sapwood.models.vision.tiles import PIXELS
from sapwood.models.vision.vit import ViT
from sapwood.multimodal.families.single import Square
from sapwood.pipelines.components import ComponentFolder, read_json
from sapwood.pipelines.picture_reader import carried
from sapwood.schema.media import Medium

_PREFIX = "vision_model."


class ClipPictures:
    """The component image_encoder, and how image_processor cuts pictures for it."""

    def __init__(self, folder: ComponentFolder, dtype: torch.dtype) -> None:
        self._encoder = folder.load("image_encoder", _AllButLast, dtype)
        settings = read_json(folder.path / "image_processor" / "preprocessor_config.json")
        self._square = Square(settings)

    def __call__(self, picture: Tensor) -> Tensor:
        """picture [H, W, 3] uint8 -> [places, size], the states before the last layer"""
        values = self._square.pixels.channels_first(self._square(picture.numpy()))
        return self._encoder(
            Medium(kind="image", digest=b"", tensors={PIXELS: carried(values[None])}, spans=())
        )


class _AllButLast:
    def __init__(self, hf: Mapping[str, Any], build: Build) -> None:
        """hf: config.json of a CLIPVisionModel"""
        own = hf.get("vision_config") or hf
        self._vit = ViT(
            build,
            own,
            num_layers=integer(own, "num_hidden_layers") - 1,
            has_class=True,
            has_last_norm=False,
        )
        self._last = f"encoder.layers.{integer(own, 'num_hidden_layers') - 1}.*"

    def __call__(self, medium: Medium) -> Tensor:
        return self._vit([medium])[0]

    def targets(self) -> dict[str, Target]:
        return self._vit.targets()

    def ignorable_tensors(self) -> tuple[str, ...]:
        return (self._last, "post_layernorm.*", "visual_projection.*", "*.position_ids")

    @staticmethod
    def checkpoint_name(name: str) -> str:
        return name.removeprefix(_PREFIX)
