"""A model that sees reads a prompt together with pictures: Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sapwood.base.errors import ConfigError, InvalidRequest
from sapwood.layers.forward_batch import AxisPositions, InputEmbeds
from sapwood.models.loader.assign import load_weights
from sapwood.models.loader.safetensors import iterate
from sapwood.models.vision.interface import Tower
from sapwood.models.vision.registry import tower_class
from sapwood.multimodal.families.qwen import Qwen2VL
from sapwood.multimodal.family import FamilySetting
from sapwood.pipelines.components import ComponentFolder, read_json, renamed, weight_files
from sapwood.pipelines.text_decoder import as_generating, load_text_decoder
from sapwood.schema.media import MediaTensor, Medium

PICTURE = "<|image_pad|>"
"""The token whose place a picture's vectors take, once for each of them."""


class PictureReader:
    """The text part, the tower, and how pictures are cut into patches."""

    def __init__(self, folder: ComponentFolder, dtype: torch.dtype, max_tokens: int) -> None:
        """max_tokens: of a prompt, besides its pictures"""
        config = as_generating(folder.config("text_encoder"))
        found = tower_class(config)
        if found is None:
            raise ConfigError(f"{folder.path}/text_encoder sees no pictures, but must")
        self._decoder = load_text_decoder(folder, "text_encoder", dtype)
        self._tower = tower = found(config, folder.build(dtype))
        _fill(tower, folder, dtype)
        has_own = (folder.path / "processor" / "tokenizer_config.json").is_file()
        self._tokenizer = folder.tokenizer("processor" if has_own else "tokenizer")
        self._picture_id = self._tokenizer.convert_tokens_to_ids(PICTURE)
        if not isinstance(self._picture_id, int) or self._picture_id < 0:
            raise ConfigError(f"the tokenizer in {folder.path} has no token {PICTURE}")
        image = read_json(folder.path / "processor" / _image_file(folder))
        image = image.get("image_processor", image)
        setting = FamilySetting(model_type="qwen2_5_vl", image=image)
        self._family, self._device = Qwen2VL(setting), folder.device
        self._max_tokens = max_tokens

    def __call__(self, text: str, pictures: Sequence[Tensor]) -> Tensor:
        """text: with one PICTURE for each of pictures [H, W, 3] uint8 -> states [T, size]"""
        prepared = [self._family.image(picture.numpy(), {}) for picture in pictures]
        pieces = text.split(PICTURE)
        assert len(pieces) > len(pictures), "each picture has its place"
        shown = [*(PICTURE * one.counts[0] for one in prepared), ""]
        # A prompt may have the token's name: those of its own are text, and refused below.
        whole = "".join(a + b for a, b in zip(pieces, shown, strict=False))
        whole += PICTURE.join(pieces[len(shown) :])
        token_ids = self._tokenizer(whole, return_tensors="pt").input_ids[0]
        at = (token_ids == self._picture_id).nonzero()[:, 0]
        counts = [one.counts[0] for one in prepared]
        if len(at) != sum(counts) or len(pieces) != len(pictures) + 1:
            raise InvalidRequest(
                f"the prompt must not have {PICTURE}, which stands for a picture", param="prompt"
            )
        if len(token_ids) - len(at) > self._max_tokens:
            raise InvalidRequest(
                f"the prompt has {len(token_ids) - len(at)} tokens with its template, but may have "
                f"{self._max_tokens}",
                param="prompt",
            )
        media = _media([one.tensors for one in prepared], counts, at)
        for medium in media:
            if (why := self._tower.why_unfit(medium)) is not None:
                raise InvalidRequest(f"a picture {why}", param="image")
        vectors = torch.cat(self._tower.encode(media)) if media else None
        (states,) = self._decoder(
            token_ids,
            embeds=None if vectors is None else InputEmbeds(at.to(self._device), vectors),
            axes=self._axes(len(token_ids), media),
        )
        return states

    def _axes(self, num_tokens: int, media: Sequence[Medium]) -> AxisPositions | None:
        positions = self._tower.positions(num_tokens, media)
        axis_of_pair = self._tower.axis_of_pair
        if positions is None or axis_of_pair is None or not media:
            return None
        there = torch.from_numpy(np.ascontiguousarray(positions)).to(self._device)
        return AxisPositions(there, axis_of_pair)


def _media(tensors: Sequence[Any], counts: Sequence[int], at: Tensor) -> list[Medium]:
    """Each picture's tokens lie together."""
    found, start = [], 0
    for own, count in zip(tensors, counts, strict=True):
        found.append(
            Medium(
                kind="image",
                digest=b"",
                tensors={name: carried(array) for name, array in own.items()},
                spans=((int(at[start]), count),),
            )
        )
        start += count
    return found


def carried(array: Any) -> MediaTensor:
    whole = np.ascontiguousarray(array)
    return MediaTensor(dtype=str(whole.dtype), shape=whole.shape, data=whole.tobytes())


def _fill(tower: Tower, folder: ComponentFolder, dtype: torch.dtype) -> None:
    files = weight_files(folder.path / "text_encoder")
    targets = tower.targets()
    own = iterate(files, dtype, wanted=lambda name: tower.checkpoint_name(name) in targets)
    load_weights(tower, renamed(own, tower.checkpoint_name), source=str(files.path))
    tower.finalize()


def _image_file(folder: ComponentFolder) -> str:
    name = "preprocessor_config.json"
    return name if (folder.path / "processor" / name).is_file() else "processor_config.json"
