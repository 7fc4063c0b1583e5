"""A decoder that reads prompts: the states of one of its layers are the prompt's vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.layers.build import Build
from sapwood.layers.forward_batch import AxisPositions, ForwardBatch, InputEmbeds
from sapwood.layers.targets import Target
from sapwood.memory.buffers import allocate_caches
from sapwood.models.config import DecoderConfig
from sapwood.models.lm.decoder import Decoder
from sapwood.models.registry import read_decoder
from sapwood.models.text_part import text_part
from sapwood.pipelines.components import ComponentFolder
from sapwood.schema.cache import pools_of

PAGE_SIZE = 16


class TextDecoder:
    """A decoder, or the text part of a larger model, without its output layer.

    It keeps the memory of one text's keys and values, as long as the longest text so far."""

    def __init__(self, hf: Mapping[str, Any], build: Build) -> None:
        """hf: config.json of the component"""
        self.config = config_of(hf)
        if len(self.config.cache_groups) != 1:
            raise ConfigError(
                f"{self.config.architecture} keeps several kinds of caches, but an encoder of "
                "prompts may have one"
            )
        self._decoder = Decoder.of(self.config, build)
        self._build = build
        self._caches: list[tuple[Tensor, ...]] = []
        self._num_pages = 0

    def __call__(
        self,
        token_ids: Tensor,
        *,
        layers: Iterable[int] = (),
        embeds: InputEmbeds | None = None,
        axes: AxisPositions | None = None,
    ) -> list[Tensor]:
        """token_ids [T] int64 of one text -> the states [T, size] that enter each of `layers`, in
        ascending order; without any, the states after the last norm alone

        embeds  in place of the embeddings of the tokens that show pictures
        axes    positions of tokens, if the text shows pictures
        """
        batch = self._batch(token_ids)
        if embeds is not None:
            batch = replace(batch, embeds=embeds)
        if axes is not None:
            batch = replace(batch, axes=axes, positions=axes.positions[0])
        wanted = sorted(set(layers))
        if not wanted:
            return [self._decoder.forward(batch)]
        return self._decoder.forward_capturing(batch, wanted)[1]

    def padded(
        self, token_ids: Tensor, pad_id: int, length: int, *, layers: Iterable[int]
    ) -> list[Tensor]:
        """As above, [length, size], of a text that is filled up with padding tokens: these attend
        to the text alone, not to each other and not to themselves."""
        wanted = sorted(set(layers))
        num_text, num_pads = len(token_ids), length - len(token_ids)
        num_pages = -(-num_text // PAGE_SIZE)
        self._reserve(num_pages + -(-num_pads // PAGE_SIZE))
        found = self._decoder.forward_capturing(self._batch(token_ids), wanted)[1]
        if num_pads < 1:
            return found
        device = self._build.device
        pads = torch.arange(num_pads, device=device)
        pages = torch.arange(num_pages, dtype=torch.int32, device=device)
        # Each is a request of its own that decodes after the text; its keys go where nobody looks.
        batch = ForwardBatch(
            token_ids=torch.full((num_pads,), pad_id, dtype=torch.int64, device=device),
            positions=num_text + pads,
            write_index=num_pages * PAGE_SIZE + pads,
            attention=AttentionBatch(
                page_table=pages.expand(num_pads, -1).contiguous(),
                query_start=torch.arange(num_pads + 1, dtype=torch.int32, device=device),
                context_len=torch.full((num_pads,), num_text, dtype=torch.int32, device=device),
                query_lens=(1,) * num_pads,
                context_lens=(num_text,) * num_pads,
                num_decodes=num_pads,
            ),
            kv_caches=self._caches,
            logits_index=pads[:0],
        )
        others = self._decoder.forward_capturing(batch, wanted)[1]
        return [torch.cat(pair) for pair in zip(found, others, strict=True)]

    def _batch(self, token_ids: Tensor) -> ForwardBatch:
        device, length = self._build.device, len(token_ids)
        self._reserve(-(-length // PAGE_SIZE))
        pages = torch.arange(self._num_pages, dtype=torch.int32, device=device)[None]
        places = torch.arange(length, device=device)
        return ForwardBatch(
            token_ids=token_ids.to(device),
            positions=places,
            write_index=places,
            attention=AttentionBatch(
                page_table=pages[:, : -(-length // PAGE_SIZE)],
                query_start=torch.tensor([0, length], dtype=torch.int32, device=device),
                context_len=torch.tensor([length], dtype=torch.int32, device=device),
                query_lens=(length,),
                context_lens=(length,),
                num_decodes=0,
            ),
            kv_caches=self._caches,
            logits_index=places[:0],
        )

    def _reserve(self, num_pages: int) -> None:
        if num_pages <= self._num_pages:
            return
        dtype = str(self._build.dtype).removeprefix("torch.")
        groups = [g.with_dtypes(kv=dtype, activations=dtype) for g in self.config.cache_groups]
        self._caches = allocate_caches(
            groups,
            [num_pages] * len(pools_of(groups)),
            page_size=PAGE_SIZE,
            device=self._build.device,
        )
        self._num_pages = num_pages

    def targets(self) -> dict[str, Target]:
        return self._decoder.body_targets()

    def ignorable_tensors(self) -> tuple[str, ...]:
        return (*self._decoder.ignorable_tensors(), "lm_head.*", "model.lm_head.*")

    def checkpoint_name(self, name: str) -> str:
        """The name in `targets()` of a checkpoint's tensor, which has no prefix without a head."""
        own = self._decoder.checkpoint_name(name)
        return own if own.startswith(("model.", "lm_head.")) else f"model.{own}"


def load_text_decoder(folder: ComponentFolder, name: str, dtype: torch.dtype) -> TextDecoder:
    """A component that is a language model, with its weights."""
    head_dim = config_of(folder.config(name)).head_dim
    return folder.load(name, TextDecoder, dtype, head_dim=head_dim)


def config_of(hf: Mapping[str, Any]) -> DecoderConfig:
    # Tied, so that it wants no output layer from the checkpoint.
    return read_decoder({**text_part(as_generating(hf)), "tie_word_embeddings": True})


def as_generating(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model with an output layer, which the house knows."""
    names = list(hf.get("architectures") or [])
    known = {
        "Qwen3Model": "Qwen3ForCausalLM",
        "Qwen2_5_VLModel": "Qwen2_5_VLForConditionalGeneration",
        "Mistral3Model": "Mistral3ForConditionalGeneration",
    }
    return {**hf, "architectures": [known.get(name, name) for name in names]}
