"""vLLM's offline `LLM`, with the prefix cache on.

Its options are those of `vllm.LLM`. On a CPU it also reads the environment: by itself it would keep
one core free and take most of the memory, which is neither a fair comparison nor a safe one, so
VLLM_CPU_OMP_THREADS_BIND and VLLM_CPU_KVCACHE_SPACE (GiB) are set where they are not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sapwood.bench.offline import Generated, TokenGenerator
from sapwood.bench.peers.interface import PeerSetup

KV_CACHE_GIB = 4


def set_environment(num_threads: int) -> None:
    """One thread for each of the first usable cores, as the other peers have."""
    cores = sorted(os.sched_getaffinity(0))[:num_threads]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(KV_CACHE_GIB))


@contextmanager
def open_vllm(setup: PeerSetup) -> Iterator[TokenGenerator]:
    set_environment(setup.num_threads)
    from vllm import LLM, SamplingParams

    options = {
        "max_model_len": 4096,
        "max_num_seqs": 64,
        "enable_prefix_caching": True,
        **setup.options,
    }
    llm = LLM(model=setup.model_dir, dtype=setup.dtype, **options)
    yield VllmGenerator(llm, SamplingParams)


class VllmGenerator:
    def __init__(self, llm: Any, sampling_params: Any) -> None:
        self._llm = llm
        self._sampling_params = sampling_params

    def generate(
        self, prompts: Sequence[Sequence[int]], output_lengths: Sequence[int]
    ) -> list[Generated]:
        params = [
            self._sampling_params(
                temperature=0, max_tokens=n, min_tokens=n, ignore_eos=True, detokenize=False
            )
            for n in output_lengths
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        results = self._llm.generate(asked, params, use_tqdm=False)
        return [
            Generated(
                num_output_tokens=len(result.outputs[0].token_ids),
                num_cached_tokens=result.num_cached_tokens or 0,
            )
            for result in results
        ]
