"""Models that answer with numbers, over a real engine: what transformers computes, they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sapwood import LLM
from sapwood.base.errors import ConfigError, InvalidRequest
from sapwood.frontends.serving.embed import embed_all
from sapwood.text.embedding import EmbedRequest
from tests.tiny import VOCAB, save_pooled

ATOL = 2e-5


def texts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(4, VOCAB - 8, length).tolist() for length in lengths]


@pytest.fixture
def open_llm() -> Iterator[Callable[..., LLM]]:
    opened: list[LLM] = []
    num_threads = torch.get_num_threads()

    def make(directory: Path, **options: Any) -> LLM:
        settings = {"dtype": "float32", "num_threads": 1, "max_total_tokens": 2048, **options}
        opened.append(LLM(str(directory), **settings))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()
    torch.set_num_threads(num_threads)


def assert_idle(llm: LLM) -> None:
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_leased_pages) == (0, 0, 0)


def hidden_of(model: Any, token_ids: list[int]) -> torch.Tensor:
    base = model.base_model
    with torch.inference_mode():
        return base(torch.tensor([token_ids])).last_hidden_state[0]


def pooled(model: Any, token_ids: list[int], method: str) -> np.ndarray:
    hidden = hidden_of(model, token_ids)
    one = {"last": hidden[-1], "mean": hidden.mean(0), "cls": hidden[0]}[method]
    return torch.nn.functional.normalize(one, dim=-1).numpy()


ENCODERS = {
    "bert": ("BertModel", {}),
    "bert with tanh-gelu": ("BertModel", {"hidden_act": "gelu_new"}),
    "roberta": ("RobertaModel", {"pad_token_id": 1, "max_position_embeddings": 130}),
    "xlm-roberta": ("XLMRobertaModel", {"pad_token_id": 1, "type_vocab_size": 1}),
}


@pytest.mark.parametrize("method", ["mean", "cls", "last"])
@pytest.mark.parametrize("case", ENCODERS)
def test_an_encoder_makes_the_vectors_of_transformers(
    open_llm: Callable[..., LLM], tmp_path: Path, case: str, method: str
) -> None:
    architecture, fields = ENCODERS[case]
    model = save_pooled(tmp_path, architecture, **fields)
    llm = open_llm(tmp_path, pooling_method=method)
    asked = texts(5, 1, 33, 5, 100, 12)
    for token_ids, result in zip(asked, llm.encode(asked), strict=True):
        np.testing.assert_allclose(result.values, pooled(model, token_ids, method), atol=ATOL)
        assert result.num_prompt_tokens == len(token_ids)
        assert result.num_cached_tokens == 0
    assert_idle(llm)


def test_an_encoder_takes_as_many_tokens_as_its_context_and_no_more(
    open_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    save_pooled(tmp_path, "BertModel")
    llm = open_llm(tmp_path, context_length=40)
    [full] = texts(40)
    assert llm.encode(full)[0].num_prompt_tokens == 40
    with pytest.raises(InvalidRequest, match="41 tokens, but the context length of 40"):
        llm.encode([*full, 5])
    assert_idle(llm)


def test_an_encoder_cannot_compute_a_text_in_chunks(
    open_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    save_pooled(tmp_path, "BertModel")
    with pytest.raises(ConfigError, match="--chunked-prefill-size is 16"):
        open_llm(tmp_path, chunked_prefill_size=16)


def test_more_texts_than_rows_pages_or_budget(open_llm: Callable[..., LLM], tmp_path: Path) -> None:
    model = save_pooled(tmp_path, "BertModel")
    llm = open_llm(
        tmp_path, max_running_requests=3, max_total_tokens=128, context_length=64, overlap_depth=2
    )
    asked = texts(*(1 + 7 * i % 64 for i in range(40)))
    for token_ids, result in zip(asked, llm.encode(asked), strict=True):
        np.testing.assert_allclose(result.values, pooled(model, token_ids, "mean"), atol=ATOL)
    assert_idle(llm)


DECODERS = {
    "qwen3": ("Qwen3Model", {"head_dim": 32, "num_key_value_heads": 1}),
    "llama": ("LlamaModel", {"num_key_value_heads": 2}),
    "states": (
        "Lfm2ForCausalLM",
        {"num_key_value_heads": 1, "full_attn_idxs": [1], "block_multiple_of": 16},
    ),
    "with an output layer": ("Qwen2ForCausalLM", {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chunk", [7, 512])
@pytest.mark.parametrize("method", ["last", "mean"])
@pytest.mark.parametrize("case", DECODERS)
def test_a_decoder_makes_the_vectors_of_transformers(
    open_llm: Callable[..., LLM], tmp_path: Path, case: str, method: str, chunk: int, depth: int
) -> None:
    architecture, fields = DECODERS[case]
    model = save_pooled(tmp_path, architecture, **fields)
    llm = open_llm(
        tmp_path,
        is_embedding=True,
        pooling_method=method,
        chunked_prefill_size=chunk,
        overlap_depth=depth,
        page_size=4,
    )
    asked = texts(5, 1, 33, 90, 12)
    for round_number in range(2):
        for token_ids, result in zip(asked, llm.encode(asked), strict=True):
            want = pooled(model, token_ids, method)
            np.testing.assert_allclose(result.values, want, atol=ATOL)
            hits = round_number == 1 and method == "last" and len(token_ids) > 4
            assert (result.num_cached_tokens > 0) == hits
    assert_idle(llm)


@pytest.mark.parametrize(
    ("case", "method", "options"),
    [
        ("qwen3", "mean", {"chunked_prefill_size": 7}),
        pytest.param("qwen3", "last", {"tp_size": 2}, marks=pytest.mark.long),
        pytest.param("states", "last", {"overlap_depth": 1}, marks=pytest.mark.long),
        pytest.param(
            "with an output layer",
            "mean",
            {"max_running_requests": 2, "max_total_tokens": 160, "context_length": 96},
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_last_stage_pools(
    open_llm: Callable[..., LLM], tmp_path: Path, case: str, method: str, options: dict[str, Any]
) -> None:
    architecture, fields = DECODERS[case]
    fields = fields | ({"num_key_value_heads": 2} if options.get("tp_size") else {})
    model = save_pooled(tmp_path, architecture, **fields)
    how = {"is_embedding": True, "pooling_method": method, "pp_size": 2, "page_size": 4}
    llm = open_llm(tmp_path, **how, **options)
    asked = texts(5, 1, 33, 90, 12)
    for _ in range(2):
        for token_ids, result in zip(asked, llm.encode(asked), strict=True):
            np.testing.assert_allclose(result.values, pooled(model, token_ids, method), atol=ATOL)
    assert_idle(llm)


def test_a_classifier_over_stages_and_an_encoder_that_has_none(
    open_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    architecture, fields = HEADS["qwen3"]
    model = save_pooled(tmp_path / "head", architecture, num_labels=3, **fields)
    llm = open_llm(tmp_path / "head", pp_size=2)
    [token_ids] = texts(33)
    with torch.inference_mode():
        want = model(torch.tensor([token_ids])).logits[0].numpy()
    np.testing.assert_allclose(llm.encode(token_ids)[0].values, want, atol=1e-4)
    save_pooled(tmp_path / "encoder", "BertModel")
    with pytest.raises(ConfigError, match="is an encoder, and --pp-size is for decoders"):
        open_llm(tmp_path / "encoder", pp_size=2)


def test_the_last_token_is_the_default_of_decoders(
    open_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    model = save_pooled(tmp_path, "Qwen3Model", head_dim=32, num_key_value_heads=1)
    llm = open_llm(tmp_path)  # saved without an output layer, so it cannot generate
    [text] = texts(9)
    [result] = llm.encode(text)
    np.testing.assert_allclose(result.values, pooled(model, text, "last"), atol=ATOL)
    [short] = llm.encode(text, dimensions=10)
    assert short.values.shape == (10,)
    want = result.values[:10] / np.linalg.norm(result.values[:10])
    np.testing.assert_allclose(short.values, want, atol=1e-6)
    with pytest.raises(InvalidRequest, match=r"dimensions is 65 but must be in \[1, 64\]"):
        llm.encode(text, dimensions=65)


HEADS = {
    "bert": ("BertForSequenceClassification", {}),
    "roberta": ("RobertaForSequenceClassification", {"pad_token_id": 1}),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", {"pad_token_id": 1}),
    "qwen3": ("Qwen3ForSequenceClassification", {"head_dim": 32, "num_key_value_heads": 1}),
    "llama": ("LlamaForSequenceClassification", {"num_key_value_heads": 2}),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_classification_head_says_what_it_says_in_transformers(
    open_llm: Callable[..., LLM], tmp_path: Path, case: str
) -> None:
    architecture, fields = HEADS[case]
    model = save_pooled(tmp_path, architecture, num_labels=3, **fields)
    llm = open_llm(tmp_path)
    asked = texts(5, 1, 33, 12)
    for token_ids, result in zip(asked, llm.encode(asked), strict=True):
        with torch.inference_mode():
            want = model(torch.tensor([token_ids])).logits[0].numpy()
        np.testing.assert_allclose(result.values, want, atol=1e-4)
    assert_idle(llm)


def test_the_texts_of_a_pair_are_told_apart(open_llm: Callable[..., LLM], tmp_path: Path) -> None:
    model = save_pooled(tmp_path, "BertForSequenceClassification", num_labels=1)
    llm = open_llm(tmp_path)
    pairs = [("a query", "and a document"), ("x", "y"), ("longer than the rest of all", "z")]
    requests = [EmbedRequest(request_id=str(i), text=pair) for i, pair in enumerate(pairs)]
    single = EmbedRequest(request_id="single", text="a queryand a document")
    answers = llm.run(embed_all(llm.services, [*requests, single]))
    for (first, second), answer in zip(pairs, answers, strict=False):
        ids = [llm.services.tokenizer.encode(text) for text in (first, second)]
        types = torch.tensor([[0] * len(ids[0]) + [1] * len(ids[1])])
        with torch.inference_mode():
            want = model(torch.tensor([ids[0] + ids[1]]), token_type_ids=types).logits[0].numpy()
        np.testing.assert_allclose(answer.values, want, atol=1e-4)
    assert abs(answers[0].values[0] - answers[-1].values[0]) > 1e-2


def test_scores_are_the_probabilities_of_transformers(
    open_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    model = save_pooled(tmp_path, "Qwen3ForCausalLM", head_dim=32, num_key_value_heads=1)
    llm = open_llm(tmp_path)
    query, *items = texts(8, 3, 10, 1)
    labels = [7, 100, 31]
    for item_first in (False, True):
        plain = llm.score(query, items, labels, item_first=item_first)
        among = llm.score(query, items, labels, apply_softmax=True, item_first=item_first)
        for item, scores, softmaxed in zip(items, plain, among, strict=True):
            prompt = item + query if item_first else query + item
            with torch.inference_mode():
                likely = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)[labels]
            np.testing.assert_allclose(scores, likely.numpy(), rtol=1e-3)
            np.testing.assert_allclose(softmaxed, (likely / likely.sum()).numpy(), rtol=1e-3)
    with pytest.raises(InvalidRequest, match="all be texts, or all be lists"):
        llm.score("text", [[1]], labels)
    with pytest.raises(InvalidRequest, match="label_token_ids has the token id 9999"):
        llm.score(query, items, [9999])
    assert_idle(llm)


def test_each_kind_of_model_says_what_it_cannot_do(
    open_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    save_pooled(tmp_path / "embeds", "BertModel")
    save_pooled(tmp_path / "classifies", "BertForSequenceClassification")
    save_pooled(tmp_path / "generates", "LlamaForCausalLM", num_key_value_heads=2)
    embeds, classifies, generates = (
        open_llm(tmp_path / name) for name in ("embeds", "classifies", "generates")
    )
    for llm, does in ((embeds, "makes embeddings"), (classifies, "classifies")):
        for ask in (
            lambda llm=llm: llm.generate("x"),
            lambda llm=llm: llm.chat([{"role": "user", "content": "x"}]),
            lambda llm=llm: llm.score("x", "y", [1]),
        ):
            with pytest.raises(InvalidRequest, match=f"{does} and generates no text"):
                ask()
    with pytest.raises(InvalidRequest, match="start the server with --is-embedding"):
        generates.encode("x")
    for llm in (embeds, classifies, generates):
        assert_idle(llm)


def test_dummy_weights_serve_too(open_llm: Callable[..., LLM], tmp_path: Path) -> None:
    save_pooled(tmp_path, "BertModel")
    (tmp_path / "model.safetensors").unlink()
    llm = open_llm(tmp_path, load_format="dummy", dtype="bfloat16")
    [result] = llm.encode("hello")
    assert np.linalg.norm(result.values) == pytest.approx(1.0, abs=1e-4)
