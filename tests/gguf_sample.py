"""Tiny GGUF files, written with the gguf library, for the tests that read or convert them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, LAYERS = 256, 512, 4, 2, 2
HEAD_DIM = HIDDEN // HEADS


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


@dataclass
class GgufSample:
    """What goes into a tiny GGUF; tests change what they are about."""

    architecture: str = "llama"
    tokens: list[str] = field(
        default_factory=lambda: ["<|end|>", "<|start|>", *byte_alphabet(), "he", "ll", "hell", "ĠĠ"]
    )
    kinds: list[int] | None = None
    merges: list[str] | None = field(default_factory=lambda: ["h e", "l l", "he ll", "Ġ Ġ"])
    scores: list[float] | None = None
    tokenizer: str | None = "gpt2"
    pre: str | None = "smollm"
    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    raw: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(str(path), self.architecture)
        metadata: Mapping[str, Any] = {**self._shape(), **self._special_ids(), **self.values}
        for key, value in metadata.items():
            is_whole = key.startswith(("tokenizer.", "general.", "split."))
            _add(writer, key if is_whole else f"{self.architecture}.{key}", value)
        self._write_tokenizer(writer)
        for name, tensor in {**self.weights(), **self.tensors}.items():
            if name not in self.raw and name not in self.left_out:
                writer.add_tensor(name, tensor)
        for name, (data, kind) in self.raw.items():
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def weights(self) -> dict[str, np.ndarray]:
        """The tensors of the model, as llama.cpp names them, in fp32."""
        shapes = {"token_embd.weight": (len(self.tokens), HIDDEN), "output_norm.weight": (HIDDEN,)}
        for layer in range(LAYERS):
            for name, shape in {
                "attn_norm": (HIDDEN,),
                "ffn_norm": (HIDDEN,),
                "attn_q": (HIDDEN, HIDDEN),
                "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
                "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
                "attn_output": (HIDDEN, HIDDEN),
                "ffn_gate": (INTERMEDIATE, HIDDEN),
                "ffn_up": (INTERMEDIATE, HIDDEN),
                "ffn_down": (HIDDEN, INTERMEDIATE),
            }.items():
                shapes[f"blk.{layer}.{name}.weight"] = shape
        rng = np.random.default_rng(7)
        return {
            name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()
        }

    def _shape(self) -> dict[str, Any]:
        return {
            "block_count": LAYERS,
            "context_length": 512,
            "embedding_length": HIDDEN,
            "feed_forward_length": INTERMEDIATE,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 10000.0,
        }

    def _special_ids(self) -> dict[str, Any]:
        if self.tokenizer is None:
            return {}
        return {"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.bos_token_id": 1}

    def _write_tokenizer(self, writer: gguf.GGUFWriter) -> None:
        if self.tokenizer is None:
            return
        writer.add_tokenizer_model(self.tokenizer)
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds or [3, 3, *[1] * (len(self.tokens) - 2)])
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case _ if key == "general.alignment":
            writer.add_custom_alignment(value)  # the writer has to know it as well
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
