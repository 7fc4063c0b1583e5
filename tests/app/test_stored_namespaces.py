"""What a storage keeps apart, and what engines find again there: adapters, pictures, weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sapwood import LLM, Engine
from tests.adapters import write_adapter
from tests.app.llms import llms_of
from tests.app.offline.test_engine import other_weights
from tests.app.test_stored_tiers import KEPT, PROMPTS
from tests.app.test_tiers import SMALL, save_peer
from tests.seeing import FAMILIES, Shown, save, save_rewritten, words
from tests.seeing import ask as ask_with_media
from tests.tiny import save_llama

GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
Stored = Callable[..., LLM]


def options(directory: Path) -> dict[str, Any]:
    extra = {"prefetch_threshold": 8, "directory": str(directory)}
    return {
        "enable_hierarchical_cache": True,
        "hicache_ratio": 6.0,
        "hicache_storage_backend": "file",
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend_extra_config": json.dumps(extra),
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(
        tmp_path_factory.mktemp("stored"),
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
    )


@pytest.fixture
def make_llm(llama: Path, tmp_path: Path) -> Iterator[Stored]:
    small = {**SMALL, "page_size": 8, **options(tmp_path / "kv")}
    with llms_of(llama, **small) as make:
        yield make


def outputs(llm: LLM, lora: str | None = None) -> tuple[list[list[int]], int]:
    """(the outputs, cached tokens of all prompts)"""
    before = llm.stats().num_cached_tokens
    found = [list(llm.generate([one], GREEDY, lora_path=lora)[0].token_ids) for one in PROMPTS]
    return found, llm.stats().num_cached_tokens - before


def test_adapters_go_by_what_they_contain(make_llm: Stored, tmp_path: Path) -> None:
    for rank in (2, 4):
        write_adapter(tmp_path / f"rank{rank}", rank)
    adapted = {"max_lora_rank": 4, "max_loras_per_batch": 1, "max_running_requests": 1}
    first = make_llm(lora_paths=f"one={tmp_path}/rank2\nother={tmp_path}/rank4", **adapted)
    base, _ = outputs(first)
    one, num_cached = outputs(first, "one")
    assert num_cached == 0, "the base's pages are not the adapter's"
    other, num_cached = outputs(first, "other")
    assert num_cached == 0
    assert base != one != other
    first.close()
    renamed = make_llm(lora_paths=f"one={tmp_path}/rank4\nanother={tmp_path}/rank2", **adapted)
    everything = len(PROMPTS) * KEPT
    assert outputs(renamed, "another") == (one, everything)
    assert outputs(renamed, "one") == (other, everything), "not by its name"
    assert outputs(renamed) == (base, everything)
    renamed.unload_lora_adapter("one")
    renamed.load_lora_adapter("one", tmp_path / "rank2")
    assert outputs(renamed, "one")[0] == one


def test_new_weights_find_nothing_of_the_old_ones(llama: Path, tmp_path: Path) -> None:
    small = {**SMALL, "page_size": 8, "dtype": "float32", **options(tmp_path / "kv")}
    b = other_weights(llama, tmp_path / "b")

    def generated(engine: Engine) -> list[tuple[list[int], int]]:
        told = engine.generate(input_ids=PROMPTS[:2], sampling_params=GREEDY)
        return [(one["output_ids"], one["meta_info"]["cached_tokens"]) for one in told]

    with Engine(model_path=str(b), **small) as fresh:
        of_b = [ids for ids, _ in generated(fresh)]
    with Engine(model_path=str(llama), **small) as engine:
        of_a = [ids for ids, _ in generated(engine)]
        assert of_a != of_b
        assert engine.update_weights_from_disk(str(b))[0]
        assert generated(engine) == [(ids, 0) for ids in of_b], "neither A's pages nor B's"
    for path, ids in ((llama, of_a), (b, of_b)):
        with Engine(model_path=str(path), **small) as again:
            assert generated(again) == [(one, KEPT) for one in ids]


def test_pictures_and_their_prefixes_are_found_by_what_they_show(tmp_path: Path) -> None:
    family = FAMILIES["Qwen2-VL"]
    save(tmp_path / "peer", family)
    model = save_rewritten(tmp_path / "peer", tmp_path / "model", family)
    size = family.sizes[0]
    shown = Shown.of(family, words(20, 1), family.picture(3, size), words(20, 2))
    other = Shown.of(family, words(20, 1), family.picture(4, size), words(20, 2))
    common = {"page_size": 8, "max_running_requests": 2, **options(tmp_path / "kv")}
    with llms_of(model, **common) as make:
        first = make()
        expected = [one.token_ids for one in ask_with_media(first, [shown])[0]]
        first.close()
        second = make()
        found = ask_with_media(second, [shown])[0]
        assert [one.token_ids for one in found] == expected
        assert found[-1].num_cached_tokens == (len(shown.token_ids) - 1) // 8 * 8
        of_other = ask_with_media(second, [other])[0]
        assert of_other[-1].num_cached_tokens == 16, "only what comes before the picture"


def test_latent_rows_come_back(tmp_path: Path) -> None:
    save_peer(tmp_path / "model", "deepseek_v2")
    common = {**SMALL, "page_size": 8, **options(tmp_path / "kv")}
    with llms_of(tmp_path / "model", **common) as make:
        first = make()
        expected, _ = outputs(first)
        first.close()
        assert outputs(make()) == (expected, len(PROMPTS) * KEPT)
