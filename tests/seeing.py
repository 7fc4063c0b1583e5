"""Tiny models that see, as transformers saves them; what they are shown, and what they then say."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from sapwood import LLM
from sapwood.schema.logprobs import LogprobOptions, TokenLogprobs
from sapwood.schema.media import MediaTensor, Medium
from sapwood.schema.output import RequestOutput
from sapwood.schema.request import Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams
from tests.tiny import VOCAB, write_tokenizer

IMAGE, VIDEO = VOCAB - 1, VOCAB - 2
"""Ids of the tokens that stand for a vector; no prompt's text has them."""
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 0,
}
CLOSE = 1e-4


@dataclass(frozen=True)
class Seeing:
    """A family: how its tiny model is made, and how a picture of it is.

    picture  from a seed and sizes to a picture without places
    num_tokens  that it stands for
    parts    into how many places, with text between, these are divided
    has_batch  whether transformers' pixels have a dimension for prompts
    rewritten  changes names of tensors and fields of config.json to those that we are to read
    video_token  that stands for a vector of a video
    needs_types  whether transformers' model is told which tokens show a picture
    """

    model_type: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    picture: Callable[[int, tuple[int, int, int]], Medium]
    num_tokens: Callable[[Medium], int]
    sizes: Sequence[tuple[int, int, int]]
    fields: Mapping[str, Any] = field(default_factory=dict)
    video_sizes: Sequence[tuple[int, int, int]] = ()
    parts: Callable[[Medium], int] = lambda _: 1
    has_batch: bool = False
    needs_types: bool = False
    video_token: int = VIDEO
    rewritten: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any] | None = None


def save(directory: Path, family: Seeing) -> Path:
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(3)
    config = AutoConfig.for_model(
        family.model_type,
        text_config={**TEXT, **family.text},
        vision_config=dict(family.vision),
        **family.fields,
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        parameter.data = 1.0 + 0.2 * noise if "norm" in name else noise * scale
    model.tie_weights()
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def save_rewritten(source: Path, directory: Path, family: Seeing) -> Path:
    """The same model as others than transformers publish it."""
    if family.rewritten is None:
        return source
    shutil.copytree(source, directory)
    config = json.loads((source / "config.json").read_text())
    tensors = family.rewritten(load_file(source / "model.safetensors"), config)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def tensor(values: torch.Tensor) -> MediaTensor:
    array = values.numpy()
    return MediaTensor(dtype=array.dtype.name, shape=array.shape, data=array.tobytes())


def medium(kind: Any, **tensors: torch.Tensor) -> Medium:
    found = {name: tensor(one) for name, one in tensors.items()}
    digest = hashlib.sha256(b"".join(one.data for one in found.values())).digest()
    return Medium(kind=kind, digest=digest, tensors=found, spans=())


def grid_picture(patch_numbers: int) -> Callable[[int, tuple[int, int, int]], Medium]:
    def make(seed: int, size: tuple[int, int, int]) -> Medium:
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(size[0] * size[1] * size[2], patch_numbers, generator=generator)
        grid = torch.tensor(size)
        if size[0] == 1:
            return medium("image", pixel_values=pixels, image_grid_thw=grid)
        return medium("video", pixel_values_videos=pixels, video_grid_thw=grid)

    return make


def grid_tokens(merge: int) -> Callable[[Medium], int]:
    def count(one: Medium) -> int:
        name = "image_grid_thw" if one.kind == "image" else "video_grid_thw"
        return int(np.frombuffer(one.tensors[name].data, np.int64).prod()) // merge**2

    return count


def tiles(side: int) -> Callable[[int, tuple[int, int, int]], Medium]:
    """Pictures of as many tiles of that side as the first size says."""

    def make(seed: int, size: tuple[int, int, int]) -> Medium:
        generator = torch.Generator().manual_seed(seed)
        return medium(
            "image", pixel_values=torch.randn(size[0], 3, side, side, generator=generator)
        )

    return make


def any_size(seed: int, size: tuple[int, int, int]) -> Medium:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(1, 3, *size[1:], generator=generator)
    return medium("image", pixel_values=pixels, image_sizes=torch.tensor(size[1:]))


def tile_tokens(count: int) -> Callable[[Medium], int]:
    """count: tokens of a tile"""
    return lambda one: int(one.tensors["pixel_values"].shape[0]) * count


def num_frames(one: Medium) -> int:
    name = "image_grid_thw" if one.kind == "image" else "video_grid_thw"
    return int(np.frombuffer(one.tensors[name].data, np.int64)[0])


def num_tiles(one: Medium) -> int:
    return int(one.tensors["pixel_values"].shape[0])


@dataclass(frozen=True)
class Shown:
    """A prompt and what stands in it."""

    token_ids: list[int]
    media: list[Medium] = field(default_factory=list)

    @staticmethod
    def of(family: Seeing, *parts: Sequence[int] | Medium) -> Shown:
        """Texts and pictures in their order."""
        ids: list[int] = []
        media: list[Medium] = []
        for part in parts:
            if isinstance(part, Medium):
                length = family.num_tokens(part)
                count = family.parts(part)
                token, spans = IMAGE if part.kind == "image" else family.video_token, []
                for index in range(count):
                    ids += words(2, index) if index else []
                    spans.append((len(ids), length // count))
                    ids += [token] * (length // count)
                media.append(replace(part, spans=tuple(spans)))
            else:
                ids += part
        return Shown(ids, media)


def words(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB - 10, (count,), generator=generator).tolist()


class Peer:
    """transformers' model: log probabilities of what follows each token."""

    def __init__(self, directory: Path, family: Seeing) -> None:
        from transformers import AutoModelForImageTextToText

        self._has_batch = family.has_batch
        self._needs_types = family.needs_types
        self._is_llama4 = family.model_type == "llama4"
        self._model = AutoModelForImageTextToText.from_pretrained(
            directory, dtype=torch.float32
        ).eval()
        self._has_axes = hasattr(getattr(self._model, "model", None), "get_rope_index")

    @torch.inference_mode()
    def __call__(self, shown: Shown, output: Sequence[int]) -> torch.Tensor:
        """[n, vocab]"""
        ids = torch.tensor([[*shown.token_ids, *output]])
        types = torch.zeros_like(ids)
        for one in shown.media:
            for start, length in one.spans:
                types[0, start : start + length] = 1 if one.kind == "image" else 2
        given: dict[str, torch.Tensor] = {}
        for one in shown.media:
            for name, part in one.tensors.items():
                array = np.frombuffer(part.data, part.dtype).reshape(part.shape)
                whole = torch.from_numpy(array.copy())
                whole = whole[None] if name.endswith(("thw", "sizes")) else whole
                given[name] = torch.cat([given[name], whole]) if name in given else whole
        if self._has_batch and "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"][None]
        if self._has_axes and shown.media:
            # As transformers' generate: an output comes behind the farthest position of the prompt.
            count = len(shown.token_ids)
            grids = {name: one for name, one in given.items() if not name.startswith("pixel")}
            of_prompt, delta = self._model.model.get_rope_index(
                ids[:, :count], types[:, :count], **grids
            )
            after = torch.arange(count, ids.shape[1]).expand(3, 1, -1) + delta
            given["position_ids"] = torch.cat((of_prompt, after), dim=-1)
        if self._needs_types:
            given["mm_token_type_ids" if self._has_axes else "token_type_ids"] = types
        if self._is_llama4:
            found = self._model.language_model(
                inputs_embeds=self._llama4_embeds(ids, given), use_cache=False
            )
            return found.logits[0].double().log_softmax(-1)
        found = self._model(input_ids=ids, use_cache=False, **given)
        return found.logits[0].double().log_softmax(-1)

    def _llama4_embeds(self, ids: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
        """What its own forward makes, which fails at what it returns of pictures."""
        embeds = self._model.get_input_embeddings()(ids)
        if "pixel_values" not in given:
            return embeds
        states = self._model.get_image_features(given["pixel_values"]).last_hidden_state
        vectors = self._model.multi_modal_projector(states)
        return embeds.masked_scatter((ids == IMAGE)[..., None], vectors)


def ask(llm: LLM, prompts: Sequence[Shown], **options: Any) -> list[list[RequestOutput]]:
    """All prompts at once; each one's outputs."""
    params = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True, **options}

    async def one(index: int, shown: Shown) -> list[RequestOutput]:
        request = Generate(
            request_id=f"seen{index}",
            prompt_ids=shown.token_ids,
            media=shown.media,
            options=RequestOptions(
                sampling=SamplingParams(**params), logprobs=LogprobOptions(num_top=3)
            ),
        )
        return [output async for output in llm._client.generate(request)]

    async def every() -> list[list[RequestOutput]]:
        return await asyncio.gather(*(one(i, shown) for i, shown in enumerate(prompts)))

    return llm.run(every())


def check(outputs: Sequence[RequestOutput], shown: Shown, peer: Peer) -> None:
    last = outputs[-1].finish
    assert last is not None
    assert last.kind == "length", last
    ids = [one for output in outputs for one in output.token_ids]
    told = TokenLogprobs.joined([one.logprobs for one in outputs if one.logprobs is not None])
    expected = peer(shown, ids)[len(shown.token_ids) - 1 : -1]
    assert expected.argmax(-1).tolist() == ids
    likeliest = torch.tensor(told.of_likeliest())[..., 0]
    assert (likeliest - expected.topk(3).values).abs().max() < CLOSE


FAMILIES: dict[str, Seeing] = {
    "Qwen2-VL": Seeing(
        "qwen2_vl",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 6, 6],
            }
        },
        {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
        | {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
        grid_picture(3 * 2 * 4 * 4),
        grid_tokens(2),
        [(1, 4, 6), (1, 8, 4), (1, 2, 10)],
        {"image_token_id": IMAGE, "video_token_id": VIDEO},
        video_sizes=[(3, 4, 4)],
    ),
    "Qwen2.5-VL": Seeing(
        "qwen2_5_vl",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 6, 6],
            }
        },
        {"depth": 3, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2}
        | {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
        | {"intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [1]},
        grid_picture(3 * 2 * 4 * 4),
        grid_tokens(2),
        [(1, 6, 10), (1, 8, 4), (1, 2, 10)],
        {"image_token_id": IMAGE, "video_token_id": VIDEO},
        video_sizes=[(3, 6, 4)],
    ),
    "Qwen3-VL": Seeing(
        "qwen3_vl",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}
            | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
        },
        {"depth": 3, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2}
        | {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
        | {"intermediate_size": 48, "num_position_embeddings": 25}
        | {"deepstack_visual_indexes": [0, 2]},
        grid_picture(3 * 2 * 4 * 4),
        grid_tokens(2),
        [(1, 4, 6), (1, 8, 4), (1, 2, 10)],
        {"image_token_id": IMAGE, "video_token_id": VIDEO},
        video_sizes=[(3, 4, 4)],
        parts=num_frames,
    ),
    "Qwen3.5": Seeing(
        "qwen3_5",
        {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 32}
        | {"linear_value_head_dim": 32, "num_hidden_layers": 4}
        | {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}
            | {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
        },
        {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2}
        | {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
        | {"intermediate_size": 48, "num_position_embeddings": 25},
        grid_picture(3 * 2 * 4 * 4),
        grid_tokens(2),
        [(1, 4, 6), (1, 8, 4), (1, 2, 10)],
        {"image_token_id": IMAGE, "video_token_id": VIDEO},
        video_sizes=[(3, 4, 4)],
        parts=num_frames,
    ),
    "InternVL": Seeing(
        "internvl",
        {"model_type": "qwen2"},
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "image_size": [24, 24], "patch_size": [4, 4]}
        | {"use_qk_norm": True},
        tiles(24),
        tile_tokens(9),
        [(1, 0, 0), (3, 0, 0), (2, 0, 0)],
        {"image_token_id": IMAGE},
    ),
    "Mistral 3": Seeing(
        "mistral3",
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "patch_size": 4}
        | {"num_hidden_layers": 2, "num_attention_heads": 2},
        any_size,
        lambda one: int(np.frombuffer(one.tensors["image_sizes"].data, np.int64).prod()) // 64,
        [(1, 16, 24)] * 3,
        {"image_token_id": IMAGE, "spatial_merge_size": 2},
        parts=lambda _: 2,
    ),
    "LLaVA 1.5": Seeing(
        "llava",
        {"model_type": "llama"},
        {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48}
        | {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 12, "patch_size": 4}
        | {"projection_dim": 32},
        tiles(12),
        tile_tokens(9),
        [(1, 0, 0), (1, 0, 0), (1, 0, 0)],
        {"image_token_id": IMAGE},
    ),
    "SmolVLM": Seeing(
        "smolvlm",
        {"model_type": "llama"},
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "image_size": 24, "patch_size": 4},
        tiles(24),
        tile_tokens(9),
        [(1, 0, 0), (3, 0, 0), (2, 0, 0)],
        {"image_token_id": IMAGE, "scale_factor": 2},
        parts=num_tiles,
        has_batch=True,
    ),
    "Idefics3": Seeing(
        "idefics3",
        {"model_type": "llama"},
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "image_size": 24, "patch_size": 4},
        tiles(24),
        tile_tokens(9),
        [(1, 0, 0), (2, 0, 0), (1, 0, 0)],
        {"image_token_id": IMAGE, "scale_factor": 2},
        parts=num_tiles,
        has_batch=True,
    ),
}
