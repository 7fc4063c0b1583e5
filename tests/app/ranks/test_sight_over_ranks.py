"""Over two ranks a model says the same of pictures: each rank has the whole tower."""

from __future__ import annotations

from pathlib import Path

import pytest

from sapwood import LLM
from tests.seeing import FAMILIES, Peer, Seeing, Shown, ask, check, save, words
from tests.seeing_families import MORE


@pytest.mark.parametrize(
    "name", ["Qwen3-VL", pytest.param("Gemma 3", marks=pytest.mark.long)], ids=str
)
def test_pictures_over_two_ranks(name: str, tmp_path: Path) -> None:
    family: Seeing = (FAMILIES | MORE)[name]
    path = save(tmp_path / "model", family)
    peer = Peer(path, family)
    one, two = (family.picture(seed, size) for seed, size in enumerate(family.sizes[:2]))
    prompts = [
        Shown.of(family, words(7, 1), one, words(9, 2)),
        Shown.of(family, words(3, 3), two, words(2, 4), one, words(30, 5)),
    ]
    sizes = {"page_size": 4, "max_running_requests": 4, "max_total_tokens": 1024}
    with LLM(str(path), dtype="float32", tp_size=2, chunked_prefill_size=16, **sizes) as llm:
        for _ in range(2):
            for outputs, shown in zip(ask(llm, prompts), prompts, strict=True):
                check(outputs, shown, peer)
