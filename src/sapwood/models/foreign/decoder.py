"""A decoder whose layers are transformers' own, over sapwood's paged attention."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.kernels.interface import Kernels
from sapwood.kernels.recording import CannotRecord, Program
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.models.foreign.attention import NAME, PagedAttention, attach, register
from sapwood.models.foreign.head import OutputLayer
from sapwood.models.foreign.structure import ForeignConfig, class_and_config

_SHOWN = 5


class ForeignDecoder:
    """From token ids to logits; what executor/runner.DecoderModel says.

    All requests of a step are one row of tokens, [1, T]: layers treat each token alone, but for
    attention, which is given the requests' pages.
    """

    def __init__(
        self, model: Any, config: ForeignConfig, kernels: Kernels, device: torch.device
    ) -> None:
        """model: made by `build`"""
        self.config = config
        self._attention = PagedAttention(kernels, config, device)
        attach(model, self._attention)
        self._layers = model.base_model
        self._embedding = model.get_input_embeddings()
        self._output_layer = OutputLayer(model)

    @staticmethod
    def load(
        directory: Path,
        config: ForeignConfig,
        kernels: Kernels,
        *,
        device: torch.device,
        dtype: torch.dtype,
        is_random: bool = False,
    ) -> ForeignDecoder:
        """The model with the weights in the directory's safetensors files.

        transformers reads them itself, because names and shapes of its modules are not always
        those of the files; it copies tensor after tensor and holds nothing twice.

        is_random  leave the weights as transformers initialises them
        Raises     WeightError, with the names, if tensors are missing or of the wrong shape"""
        register()
        architecture, hf, _ = class_and_config(
            directory, config.hf, trust_remote_code=config.runs_code
        )
        if is_random:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = architecture._from_config(hf, attn_implementation=NAME, dtype=dtype)
        else:
            model, report = architecture.from_pretrained(
                str(directory),
                config=hf,
                dtype=dtype,
                attn_implementation=NAME,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, with the missing ones
                output_loading_info=True,
            )
            _refuse_mistakes(report, directory)
        return ForeignDecoder(model.to(device).eval(), config, kernels, device)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states of all tokens after the last norm, [T, hidden]; writes their KV."""
        self._attention.batch = batch
        try:
            output = self._layers(
                **self._tokens(batch), position_ids=batch.positions[None], use_cache=False
            )
        finally:
            self._attention.batch = None
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _tokens(self, batch: ForwardBatch) -> dict[str, Tensor]:
        if batch.embeds is None:
            return {"input_ids": batch.token_ids[None]}
        embedded = self._embedding(batch.token_ids)
        vectors = batch.embeds.vectors.to(embedded.dtype)
        return {"inputs_embeds": embedded.index_copy(0, batch.embeds.at, vectors)[None]}

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab], in fp32"""
        return self._output_layer(hidden).float()

    def compute(self, batch: ForwardBatch) -> Tensor:
        """Logits [S, vocab] of the rows at batch.logits_index; writes the KV of all tokens."""
        return self.logits(self.forward(batch).index_select(0, batch.logits_index))

    def program(self, states: Collection[int] | None = None) -> Program:
        raise CannotRecord("transformers computes the layers, op by op")


def _refuse_mistakes(report: Any, directory: Path) -> None:
    """Raises WeightError if transformers had to make up weights."""
    wrong = {
        "missing": sorted(map(str, report["missing_keys"])),
        "of the wrong shape": sorted(str(one[0]) for one in report["mismatched_keys"]),
        "unreadable": sorted(map(str, report.get("error_msgs") or ())),
    }
    found = [
        f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{' …' if len(names) > _SHOWN else ''}"
        for kind, names in wrong.items()
        if names
    ]
    if found:
        raise WeightError(
            f"{directory} does not fit the architecture; {'; '.join(found)}. Check that "
            "config.json and the weights are of the same model and complete"
        )
