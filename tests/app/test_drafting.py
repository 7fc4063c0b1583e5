"""What a draft model guesses changes how many steps an output takes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sapwood import LLM
from sapwood.base.errors import ConfigError
from sapwood.schema import grammar as grammars
from tests.app.building.test_speculation import SAME, ask, check_figures
from tests.app.llms import llms_of
from tests.tiny import save_lfm2, save_qwen3, write_llama

Make = Callable[..., LLM]
NUM_STEPS = 3


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("models") / "tiny-qwen3")


@pytest.fixture(scope="module")
def other_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same vocabulary, of whose guesses few are right."""
    return write_llama(tmp_path_factory.mktemp("models") / "tiny-draft", num_hidden_layers=1)


@contextmanager
def llms(model_path: Path) -> Iterator[Make]:
    with llms_of(model_path, page_size=4, enable_return_hidden_states=True) as make:
        yield make


@pytest.fixture
def make_llm(model_path: Path) -> Iterator[Make]:
    with llms(model_path) as make:
        yield make


def drafting_with(path: Path, **options: Any) -> dict[str, Any]:
    return {
        "speculative_algorithm": "STANDALONE",
        "disable_speculative_adaptation": True,
        "speculative_draft_model_path": str(path),
        **options,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "one step at a time": {},
    "overlap": {"overlap_depth": 2},
    "retractions": {"max_total_tokens": 96, "schedule_conservativeness": 0.0},
    "8-bit cache": {"kv_cache_dtype": "int8"},
    "chunks": {"chunked_prefill_size": 12},
    "op by op": {"disable_graphs": True},
}


def test_a_random_draft_model_changes_no_output(make_llm: Make, other_path: Path) -> None:
    draft = drafting_with(other_path, speculative_draft_load_format="dummy")
    plain, guessing = make_llm(), make_llm(**draft)
    for name, asked in SAME.items():
        for got, wanted in zip(ask(guessing, **asked), ask(plain, **asked), strict=True):
            assert got.token_ids == wanted.token_ids, name
            assert got.finish == wanted.finish, name
            check_figures(got, wanted, atol=1e-4)
    stats = guessing.stats()
    assert stats.num_leased_pages == stats.num_running == stats.num_waiting == 0
    assert stats.speculated is not None
    assert stats.speculated.num_drafted > 100


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_is_a_perfect_draft_of_itself(
    make_llm: Make, model_path: Path, variant: str
) -> None:
    """All guesses are right, with a temperature too; so are those after a prefix hit."""
    options = VARIANTS[variant]
    steps = {"speculative_num_steps": NUM_STEPS}
    llm = make_llm(**drafting_with(model_path, **steps), **options)
    count = 2 * (NUM_STEPS + 1) + 1  # the prompt's step brings one token
    for asked in ({}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "seed": 4}):
        for sample in ask(llm, ignore_eos=True, max_new_tokens=count, **asked):
            assert len(sample.token_ids) == count
            assert sample.speculated is not None
            if not options.keys() & {"max_total_tokens", "chunked_prefill_size"}:
                assert sample.speculated.num_steps == 3
            assert sample.speculated.num_accepted == sample.speculated.num_drafted
    stats = llm.stats()
    assert stats.num_leased_pages == 0


def test_a_draft_model_that_does_not_fit_is_named(
    make_llm: Make, tmp_path: Path, model_path: Path
) -> None:
    short = write_llama(tmp_path / "short", max_position_embeddings=64)
    with pytest.raises(ConfigError, match="--context-length 64 or less"):
        make_llm(**drafting_with(short, speculative_draft_load_format="dummy"))
    renamed = write_llama(tmp_path / "renamed")
    tokenizer = renamed / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace('"b":', '"<1>":').replace('"c":', '"b":'))
    with pytest.raises(ConfigError, match="another vocabulary than"):
        make_llm(**drafting_with(renamed, speculative_draft_load_format="dummy"))
    keeps_states = save_lfm2(tmp_path / "lfm2")
    with pytest.raises(ConfigError, match="keep a state"):
        make_llm(**drafting_with(keeps_states))


def test_the_pool_has_room_for_both_models(make_llm: Make, model_path: Path) -> None:
    alone, both = (
        llm._engine._engine.ready.pools
        for llm in (make_llm(), make_llm(**drafting_with(model_path)))
        if llm._engine._engine is not None
    )
    assert both[0].unit_bytes == 2 * alone[0].unit_bytes


def test_a_model_with_states_has_a_draft_model(tmp_path: Path, other_path: Path) -> None:
    """Where a guess was wrong the state goes back, and what was right is computed again, by both
    models."""
    draft = drafting_with(other_path, speculative_draft_load_format="dummy")
    with llms(save_lfm2(tmp_path / "lfm2")) as make:
        plain, guessing = make(), make(**draft)
        for name in ("to the end", "seeds", "stop token"):
            pairs = zip(ask(guessing, **SAME[name]), ask(plain, **SAME[name]), strict=True)
            assert all(got.token_ids == wanted.token_ids for got, wanted in pairs), name
        stats = guessing.stats()
        assert stats.speculated is not None
        assert stats.speculated.num_drafted > 50
        assert stats.num_leased_pages == 0


@pytest.mark.parametrize("backend", ["xgrammar", "llguidance"])
def test_guesses_keep_to_grammars_and_biases(
    make_llm: Make, model_path: Path, backend: str
) -> None:
    """The model as a draft of itself is right under a grammar too, since its guesses are masked."""
    draft = drafting_with(model_path, speculative_num_steps=NUM_STEPS)
    plain, guessing = (make_llm(**one, grammar_backend=backend) for one in ({}, draft))
    asked = {
        "grammar": grammars.regex("([ab][cd]|[ef]g?){20}"),
        "logit_bias": {ord("e") - ord("!"): 1.5},
        "temperature": 1.0,
        "seed": 2,
        "max_new_tokens": 30,
    }
    for got, wanted in zip(ask(guessing, **asked), ask(plain, **asked), strict=True):
        assert got.token_ids == wanted.token_ids
        assert got.speculated is not None
        assert got.speculated.num_accepted == got.speculated.num_drafted > 15
