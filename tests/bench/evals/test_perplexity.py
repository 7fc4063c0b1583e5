from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.bench.evals import perplexity
from sapwood.bench.evals.options import PerplexityOptions
from sapwood.bench.evals.perplexity import Perplexity, WindowScorer, measure
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.models.registry import read_decoder
from tests.models.lm.harness import make_decoder
from tests.models.lm.peer import Peer, make_peer, random_text

VOCAB = 131
CPU = torch.device("cpu")


class Model:
    """Logits of the next token by a function of the tokens that it is given."""

    def __init__(self, logits_of: Callable[[Tensor], Tensor]) -> None:
        self._logits_of = logits_of
        self.batches: list[ForwardBatch] = []

    def compute(self, batch: ForwardBatch) -> Tensor:
        self.batches.append(batch)
        return self._logits_of(batch.token_ids)


@pytest.fixture(scope="module")
def peer() -> Peer:
    return make_peer("llama", "LlamaForCausalLM")


def scorer(
    model: Any, hf_config: dict[str, Any], *, window: int, page_size: int = 16
) -> WindowScorer:
    return WindowScorer(
        model,
        read_decoder(hf_config),
        window=window,
        page_size=page_size,
        device=CPU,
        kv_cache_dtype="float32",
        dtype="float32",
    )


def real_scorer(peer: Peer, **options: int) -> WindowScorer:
    model = make_decoder(peer.hf_config, peer.weights, TorchKernels())
    return scorer(model, peer.hf_config, **options)


@torch.inference_mode()
def by_transformers(peer: Peer, window: list[int]) -> float:
    chances = peer.logits(window).log_softmax(-1)
    return -sum(chances[i, token].item() for i, token in enumerate(window[1:]))


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(
    peer: Peer,
) -> None:
    uniform = Model(lambda tokens: torch.full((len(tokens), VOCAB), 3.0))
    found = measure(
        scorer(uniform, peer.hf_config, window=50), random_text(120), window=50, num_tokens=1000
    )
    assert found.num_tokens == 98
    assert found.perplexity == pytest.approx(VOCAB, rel=1e-6)


def test_a_model_that_knows_everything_is_not_perplexed(peer: Peer) -> None:
    following = Model(lambda tokens: torch.eye(VOCAB)[(tokens + 1) % VOCAB] * 100)
    counting = [i % VOCAB for i in range(300)]
    score = scorer(following, peer.hf_config, window=100)
    assert measure(score, counting, window=100, num_tokens=300).perplexity == pytest.approx(1.0)
    backwards = measure(score, counting[::-1], window=100, num_tokens=300)
    assert backwards.negative_log_likelihood == pytest.approx(100.0, rel=1e-3)


@pytest.mark.parametrize("length", [2, 17, 64])
def test_a_window_is_scored_as_transformers_does(peer: Peer, length: int) -> None:
    text = random_text(length)
    expected = by_transformers(peer, text)
    assert real_scorer(peer, window=64)(text) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("chunk", "page_size"), [(1, 16), (7, 4), (16, 16), (63, 64), (1000, 5)])
def test_chunks_and_pages_do_not_change_the_result(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, chunk: int, page_size: int
) -> None:
    text = random_text(64)
    expected = real_scorer(peer, window=64)(text)
    monkeypatch.setattr(perplexity, "CHUNK_TOKENS", chunk)
    found = real_scorer(peer, window=64, page_size=page_size)(text)
    assert found == pytest.approx(expected, rel=1e-5)


def test_no_more_tokens_than_a_chunk_are_computed_at_once(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "CHUNK_TOKENS", 10)
    model = Model(lambda tokens: torch.zeros(len(tokens), VOCAB))
    scorer(model, peer.hf_config, window=32)(random_text(32))
    assert [batch.attention.query_lens for batch in model.batches] == [(10,), (10,), (10,), (1,)]
    assert [batch.attention.context_lens for batch in model.batches] == [(10,), (20,), (30,), (31,)]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_model_with_states_is_scored_as_transformers_does(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(perplexity, "CHUNK_TOKENS", chunk)
    hybrid = make_peer("lfm2", "Lfm2ForCausalLM", head_dim=32, full_attn_idxs=[1])
    score = real_scorer(hybrid, window=32)
    for seed in (0, 1):  # the second window finds the state of the first
        text = random_text(32, seed=seed)
        assert score(text) == pytest.approx(by_transformers(hybrid, text), rel=1e-5)


def test_windows_know_nothing_of_each_other(peer: Peer) -> None:
    text = random_text(100)
    score = real_scorer(peer, window=32)
    found = measure(score, text, window=32, num_tokens=100)
    windows = [text[i : i + 32] for i in (0, 32, 64)]
    expected = sum(by_transformers(peer, window) for window in windows) / (3 * 31)
    assert found.num_tokens == 93
    assert found.negative_log_likelihood == pytest.approx(expected, rel=1e-5)
    assert measure(score, text[::-1], window=32, num_tokens=100) != found


def test_only_so_many_tokens_as_asked_for(peer: Peer) -> None:
    score = real_scorer(peer, window=32)
    text = random_text(100)
    assert measure(score, text, window=32, num_tokens=70) == measure(
        score, text[:64], window=32, num_tokens=1000
    )


def test_a_text_shorter_than_a_window(peer: Peer) -> None:
    with pytest.raises(ConfigError, match=r"has 31 tokens, less than one --window of 32"):
        measure(real_scorer(peer, window=32), random_text(31), window=32, num_tokens=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "--window is 1 but must be >= 2"),
        ({"window": 64, "num_text_tokens": 63}, r"--num-text-tokens is 63 .* one --window \(64\)"),
    ],
)
def test_options_that_contradict(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PerplexityOptions(**options)


def test_perplexity_is_e_to_the_mean() -> None:
    assert Perplexity(num_tokens=5, negative_log_likelihood=math.log(7)).perplexity == (
        pytest.approx(7)
    )
