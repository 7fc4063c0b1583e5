"""OpenVINO GenAI's continuous batching pipeline on the CPU, with the prefix cache on.

The peer's `model` names a directory that `optimum-cli export openvino` has made of the checkpoint.
The options are OpenVINO's properties, and `cache_size`, the scheduler's cache in GiB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sapwood.bench.offline import Generated, TokenGenerator
from sapwood.bench.peers.interface import PeerSetup

PRECISIONS = {"bfloat16": "bf16", "float32": "f32", "float16": "f16"}


@contextmanager
def open_openvino(setup: PeerSetup) -> Iterator[TokenGenerator]:
    import openvino
    import openvino_genai as genai

    options = dict(setup.options)
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = options.pop("cache_size", 3)
    scheduler.enable_prefix_caching = True
    scheduler.max_num_seqs = 64
    scheduler.dynamic_split_fuse = True
    properties = {
        "INFERENCE_NUM_THREADS": setup.num_threads,
        "INFERENCE_PRECISION_HINT": PRECISIONS[setup.dtype],
        **options,
    }
    pipeline = genai.ContinuousBatchingPipeline(setup.model_dir, scheduler, "CPU", properties)
    yield OpenVinoGenerator(pipeline, genai, openvino)


class OpenVinoGenerator:
    def __init__(self, pipeline: Any, genai: Any, openvino: Any) -> None:
        self._pipeline = pipeline
        self._genai = genai
        self._openvino = openvino

    def generate(
        self, prompts: Sequence[Sequence[int]], output_lengths: Sequence[int]
    ) -> list[Generated]:
        import numpy as np

        tensors = [self._openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        configs = [self._greedy(length) for length in output_lengths]
        results = self._pipeline.generate(tensors, configs)
        return [Generated(num_output_tokens=len(result.m_generation_ids[0])) for result in results]

    def _greedy(self, num_output_tokens: int) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = num_output_tokens
        config.min_new_tokens = num_output_tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        return config
