"""SmolLM2 in fp32 says exactly what transformers' says, alone and in company."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from torch import Tensor

from sapwood import LLM
from sapwood.store import ModelFiles

PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "In 1969, humans",
    "To make bread you need",
    "A prime number is",
    "The opposite of hot is",
    "import numpy as np\n",
    "Dear Sir or Madam,",
    "Q: What is 2 + 2?\nA:",
    "The mitochondria",
    "She opened the door and",
    "List of planets: Mercury, Venus,",
    "Shakespeare wrote",
    "El perro",
    "1, 2, 3, 4, 5,",
    "The best way to learn a language is",
    "Photosynthesis is the process by which",
]


@pytest.mark.parametrize(
    ("kernels", "num_prompts", "num_tokens"),
    [
        (None, 6, 24),
        ("torch", 2, 8),
        pytest.param(None, 20, 64, marks=pytest.mark.long),
        pytest.param("torch", 4, 16, marks=pytest.mark.long),
    ],
)
def test_greedy_tokens_equal_transformers(
    smollm2_files: ModelFiles,
    smollm2_logits: Callable[[Sequence[int]], Tensor],
    kernels: str | None,
    num_prompts: int,
    num_tokens: int,
) -> None:
    """Each output token is the one that transformers puts after the prompt and the tokens before
    it; by induction the whole output is what its greedy `generate` returns."""
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    options = {
        "dtype": "float32",
        "quantization": "none",
        "max_total_tokens": 4096,
        "kernels": kernels,
    }
    with LLM(smollm2_files.name, **options) as llm:
        encode = llm.services.tokenizer.encode
        prompts = [encode(prompt) for prompt in PROMPTS[:num_prompts]]
        together = llm.generate(prompts, sampling)
        assert llm.flush_cache()
        alone = [llm.generate(prompt, sampling)[0] for prompt in prompts]
        half = num_tokens // 2
        begun = [
            [*prompt, *one.token_ids[:half]] for prompt, one in zip(prompts, alone, strict=True)
        ]
        continued = llm.generate(begun, {**sampling, "max_new_tokens": num_tokens - half})
    for prompt, *results, rest in zip(prompts, together, alone, continued, strict=True):
        output = list(results[0].token_ids)
        assert len(output) == num_tokens
        likeliest = smollm2_logits(prompt + output).argmax(-1).tolist()
        assert likeliest[len(prompt) - 1 : -1] == output
        assert list(results[1].token_ids) == output
        # What was computed before is not computed again, and it makes no difference.
        assert rest.num_cached_tokens >= (len(prompt) + half - 1) // 16 * 16
        assert list(rest.token_ids) == output[half:]
