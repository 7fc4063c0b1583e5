"""A tiny Whisper, as transformers saves it, and what it is told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from sapwood.schema.media import MediaTensor, Medium
from tests.seeing import Shown
from tests.tiny import write_tokenizer

BINS, VECTORS = 16, 24
SPECIAL = (
    *("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>"),
    *("<|transcribe|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"),
)
FIRST, TIMES = 256, 101
"""The first special token, after one per byte; tokens that stand for times."""


def save(directory: Path, **fields: Any) -> Path:
    """fields: of config.json, instead of the usual ones"""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(5)
    usual: dict[str, Any] = {
        "vocab_size": FIRST + len(SPECIAL) + TIMES,
        "num_mel_bins": BINS,
        "d_model": 48,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 3,
        "encoder_ffn_dim": 80,
        "decoder_ffn_dim": 80,
        "max_source_positions": VECTORS,
        "max_target_positions": 128,
        "bos_token_id": FIRST,
        "eos_token_id": FIRST,
        "pad_token_id": 0,
        "decoder_start_token_id": FIRST + 1,
        "init_std": 0.3,
    }
    config = WhisperConfig(**{**usual, **fields})
    model = WhisperForConditionalGeneration(config).eval()
    for name, one in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(one, std=0.2)
    model.save_pretrained(directory)
    _write_tokenizer(directory)
    generation = {
        "eos_token_id": FIRST,
        "is_multilingual": True,
        # Only letters are heard, so that every text can be read.
        "suppress_tokens": [*range(32), *range(94, FIRST)],
        "begin_suppress_tokens": [FIRST],
    }
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def _write_tokenizer(directory: Path) -> None:
    write_tokenizer(directory)
    config = json.loads((directory / "tokenizer.json").read_text())
    config["added_tokens"] = []
    backend = tokenizers.Tokenizer.from_str(json.dumps(config))
    backend.add_special_tokens([*SPECIAL, *(f"<|{step / 50:.2f}|>" for step in range(TIMES))])
    assert backend.token_to_id("<|0.00|>") == FIRST + len(SPECIAL)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text("{}")


def sound(seed: int) -> Medium:
    """The spectrum of a sound that nobody has heard."""
    numbers = np.random.default_rng(seed).normal(size=(BINS, 2 * VECTORS)).astype("<f4")
    return Medium(
        kind="audio",
        digest=hashlib.sha256(numbers.tobytes()).digest(),
        tensors={
            "input_features": MediaTensor(
                dtype="float32", shape=numbers.shape, data=numbers.tobytes()
            )
        },
        spans=((0, 1),),
        num_across=VECTORS,
    )


def told(seed: int, token_ids: Sequence[int]) -> Shown:
    return Shown(list(token_ids), [sound(seed)])


class Peer:
    """transformers' model: log probabilities of what follows each token."""

    def __init__(self, directory: Path) -> None:
        from transformers import WhisperForConditionalGeneration

        loaded = WhisperForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
        self._model = loaded.eval()

    @torch.inference_mode()
    def __call__(self, shown: Shown, output: Sequence[int]) -> torch.Tensor:
        """[n, vocab]"""
        part = shown.media[0].tensors["input_features"]
        numbers = np.frombuffer(part.data, "<f4").reshape(part.shape)
        found = self._model(
            input_features=torch.from_numpy(numbers.copy())[None],
            decoder_input_ids=torch.tensor([[*shown.token_ids, *output]]),
            use_cache=False,
        )
        return found.logits[0].double().log_softmax(-1)
