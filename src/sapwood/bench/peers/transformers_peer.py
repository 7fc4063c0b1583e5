"""transformers' own `generate`: what most people run first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sapwood.base.errors import ConfigError
from sapwood.bench.offline import Generated, TokenGenerator
from sapwood.bench.peers.interface import PeerSetup


@contextmanager
def open_transformers(setup: PeerSetup) -> Iterator[TokenGenerator]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(setup.num_threads)
    dtype = getattr(torch, setup.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(setup.model_dir, dtype=dtype)
    model.eval()
    yield TransformersGenerator(model)


class TransformersGenerator:
    """One static batch per call, padded on the left, as `generate` wants it.

    The end-of-sequence token is taken out of the generation config: outputs have their full length.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        model.generation_config.eos_token_id = None
        # Many checkpoints set these for chatting; with greedy decoding they only cause warnings.
        for name in ("temperature", "top_p", "top_k"):
            setattr(model.generation_config, name, None)

    def generate(
        self, prompts: Sequence[Sequence[int]], output_lengths: Sequence[int]
    ) -> list[Generated]:
        """The outputs of one batch; ConfigError if lengths differ: a static batch ends for all."""
        import torch

        if len(set(output_lengths)) != 1:
            raise ConfigError(
                "transformers' generate ends a batch for all at once; compare it on workloads "
                "with one output length"
            )
        num_new = output_lengths[0]
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        with torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=num_new,
                min_new_tokens=num_new,
                do_sample=False,
                pad_token_id=0,
            )
        return [Generated(num_output_tokens=int(output.shape[1]) - longest) for _ in prompts]
