"""transformers on the same shape with random weights: `generate`, and its continuous batching."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sapwood.bench.gpu.engines import free_memory
from sapwood.bench.gpu.shapes import Shape
from sapwood.kernels.transfer import synchronize


class TransformersPeer:
    """Greedy outputs of exact lengths. Made by `open_transformers`."""

    def __init__(self, model: Any, vocab_size: int, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._vocab_size = vocab_size
        self._random = random.Random(0)

    def _prompts(self, count: int, num_tokens: int) -> list[list[int]]:
        return [
            [self._random.randrange(self._vocab_size) for _ in range(num_tokens)]
            for _ in range(count)
        ]

    def decode_s(self, prompt_tokens: int, output_tokens: int) -> float:
        """Seconds per output token of a single stream, the first one left out."""

        def run(count: int) -> float:
            ids = torch.tensor(self._prompts(1, prompt_tokens), device=self._device)
            synchronize(self._device)
            start_s = time.perf_counter()
            with torch.inference_mode():
                self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=count,
                    min_new_tokens=count,
                    do_sample=False,
                    pad_token_id=0,
                )
            synchronize(self._device)
            return time.perf_counter() - start_s

        run(2)
        return max(run(output_tokens) - run(1), 1e-9) / (output_tokens - 1)

    def batching_tok_s(self, num_requests: int, prompt_tokens: int, output_tokens: int) -> float:
        """Output tokens per second of continuous batching, its own set-up left out."""
        import transformers

        make_config: Any = transformers.GenerationConfig
        options: dict[str, Any] = {
            "generation_config": make_config(
                max_new_tokens=output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
            )
        }
        if self._device.type == "cpu":
            # By default transformers fills nearly all memory with its cache of zeros.
            from transformers.generation import configuration_utils as limits

            make_limits: Any = limits.ContinuousBatchingConfig
            options["continuous_batching_config"] = make_limits(num_blocks=16, max_batch_tokens=64)
        self._model.generate_batch(self._prompts(2, 8), **options)
        prompts = self._prompts(num_requests, prompt_tokens)
        start_s = time.perf_counter()
        results = self._model.generate_batch(prompts, **options)
        synchronize(self._device)
        seconds = time.perf_counter() - start_s
        num_tokens = sum(len(result.generated_tokens) for result in results.values())
        wanted = num_requests * output_tokens
        if num_tokens != wanted:
            raise RuntimeError(f"it put out {num_tokens} tokens instead of {wanted}")
        return num_tokens / seconds


@contextmanager
def open_transformers(
    shape: Shape, device: torch.device, dtype: torch.dtype
) -> Iterator[TransformersPeer]:
    import transformers

    values = dict(shape.config)
    [architecture] = values.pop("architectures")
    values.pop("torch_dtype")
    build = getattr(transformers, architecture)
    config = build.config_class(
        **values, eos_token_id=None, bos_token_id=None, attn_implementation="sdpa"
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = build(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    try:
        yield TransformersPeer(model, int(values["vocab_size"]), device)
    finally:
        del model
        free_memory()
