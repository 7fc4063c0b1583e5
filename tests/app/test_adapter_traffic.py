"""Many LoRA adapters with room for few: nothing is lost, and no answer is another adapter's."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sapwood import LLM
from sapwood.frontends.serving.generate import adapted
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.text.generation import TextRequest
from tests.adapters import ATTENTION, MLP, save_adapters
from tests.app.test_windows import text
from tests.tiny import save_qwen3

log = logging.getLogger(__name__)

NUM_OUTPUTS = 8
NUM_WORKERS = 12


def copies(template: Path, folder: Path, count: int) -> dict[str, Path]:
    """Adapters with the layers of the template, and random numbers of their own."""
    shapes = load_file(template / "adapter_model.safetensors")
    found = {}
    for number in range(count):
        path = folder / f"a{number}"
        path.mkdir(parents=True)
        shutil.copy(template / "adapter_config.json", path)
        generator = torch.Generator().manual_seed(number)
        tensors = {
            name: torch.randn(tensor.shape, generator=generator) * 0.2
            for name, tensor in shapes.items()
        }
        save_file(tensors, path / "adapter_model.safetensors")
        found[path.name] = path
    return found


class Traffic:
    """Requests with random adapters, whose answers are known.

    longest_gap_s  between two tokens of a request, so far
    """

    def __init__(self, llm: LLM, paths: dict[str, Path], expected: dict[str, list[int]]) -> None:
        self._llm, self._paths, self._expected = llm, paths, expected
        self.num_answers = 0
        self.longest_gap_s = 0.0

    async def answer(self, adapter: str, request_id: str) -> list[int]:
        request = TextRequest(
            request_id=request_id,
            prompt=prompt_of(adapter),
            options=RequestOptions(
                sampling=SamplingParams(
                    temperature=0.0, max_new_tokens=NUM_OUTPUTS, ignore_eos=True
                ),
                adapter=self._llm.services.adapter_of("", adapter),
            ),
        )
        tokens: list[int] = []
        last_s: float | None = None
        async with adapted(self._llm.services, [request]) as [own]:
            async for chunk in self._llm.services.generator.generate(own):
                assert chunk.finish is None or chunk.finish.kind != "error", chunk.finish
                now_s = time.perf_counter()
                if last_s is not None:
                    self.longest_gap_s = max(self.longest_gap_s, now_s - last_s)
                last_s = now_s
                tokens += chunk.token_ids
        return tokens

    async def worker(self, number: int, *, seconds: float, requests: int) -> None:
        """Until both are over: the time, and this worker's requests."""
        chosen = random.Random(number)
        end_s = time.perf_counter() + seconds
        index = 0
        while index < requests or time.perf_counter() < end_s:
            adapter = chosen.choice(["", *self._paths])
            tokens = await self.answer(adapter, f"{number}-{index}")
            assert tokens == self._expected[adapter], adapter
            self.num_answers += 1
            index += 1

    async def all(self, *, seconds: float, requests: int) -> None:
        workers = [
            self.worker(number, seconds=seconds, requests=requests) for number in range(NUM_WORKERS)
        ]
        await asyncio.gather(*workers)


def prompt_of(adapter: str) -> list[int]:
    return text(5 + len(adapter) * 3, seed=len(adapter))


@pytest.mark.parametrize(
    ("num_adapters", "room", "seconds", "overlaps"),
    [
        (12, 3, 0.0, False),
        (12, 3, 0.0, True),
        pytest.param(100, 8, 180.0, False, marks=pytest.mark.long),
    ],
)
def test_many_adapters_with_room_for_few(
    tmp_path: Path,
    num_adapters: int,
    room: int,
    seconds: float,
    overlaps: bool,
) -> None:
    model_path = save_qwen3(tmp_path / "model", num_hidden_layers=2)
    options = {"it": {"r": 4, "lora_alpha": 4, "target_modules": [*ATTENTION, *MLP]}}
    made, _ = save_adapters(model_path, tmp_path / "template", options)
    paths = copies(made["it"], tmp_path / "adapters", num_adapters)
    settings: dict[str, Any] = {
        "dtype": "float32",
        "num_threads": 1,
        "page_size": 4,
        "max_total_tokens": 2048,
        "max_running_requests": 16,
        "skip_server_warmup": True,
        "max_lora_rank": 4,
        "max_loras_per_batch": room,
        "max_loaded_loras": 2 * room,
        "enable_lora_overlap_loading": overlaps,
    }
    with LLM(str(model_path), enable_lora=True, **settings) as llm:
        for name, path in paths.items():
            llm.load_lora_adapter(name, path)
        alone = Traffic(llm, paths, {})
        names = ["", *paths]
        expected = {name: llm.run(alone.answer(name, f"alone {name}")) for name in names}
        assert len({tuple(tokens) for tokens in expected.values()}) > num_adapters // 2
        traffic = Traffic(llm, paths, expected)
        llm.run(traffic.all(seconds=seconds, requests=4))
        status = llm.stats()
        assert status.adapters is not None
        assert status.adapters.num_evictions > room
        assert status.adapters.num_loaded <= 2 * room
        assert status.num_leased_pages == 0
        log.info(
            "%d answers, %d evictions; between two tokens at most %.3f s alone, %.3f s in traffic",
            traffic.num_answers,
            status.adapters.num_evictions,
            alone.longest_gap_s,
            traffic.longest_gap_s,
        )
