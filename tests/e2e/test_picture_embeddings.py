"""Vectors and ranks of pictures over HTTP: as transformers computes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from tests.e2e.server import Server, serving
from tests.pictures import data_url, picture
from tests.seeing import IMAGE
from tests.served_sight import TEMPLATE, save_served

TALL, WIDE = picture(33, 90), picture(70, 50)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("qwen2_vl"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with serving("--model", str(model), "--dtype", "float32", "--is-embedding") as one:
        yield one


@pytest.fixture(scope="module")
def peer(model: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()


def prompt_of(model: Path, pieces: list[str | Image.Image]) -> dict[str, torch.Tensor]:
    """What the model reads of texts and pictures one after the other."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    processor = Qwen2VLImageProcessorPil.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    pixels, grids = [], []
    for piece in pieces:
        if isinstance(piece, str):
            ids += tokenizer.encode(piece, add_special_tokens=False)
            continue
        found = processor(piece, return_tensors="pt")
        pixels.append(found["pixel_values"])
        grids.append(found["image_grid_thw"])
        ids += [IMAGE] * (int(grids[-1].prod()) // 4)
    inputs = {"input_ids": torch.tensor([ids])}
    if pixels:
        kinds = (inputs["input_ids"] == IMAGE).long()
        inputs |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)}
        inputs["mm_token_type_ids"] = kinds
    return inputs


def vector_of(peer: Any, model: Path, pieces: list[str | Image.Image]) -> np.ndarray:
    with torch.inference_mode():
        hidden = peer.model(**prompt_of(model, pieces)).last_hidden_state[0, -1]
    return torch.nn.functional.normalize(hidden, dim=-1).numpy()


def embed(server: Server, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60)


def test_items_of_text_and_image(server: Server, peer: Any, model: Path) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        items: Any = [
            {"text": "the oak"},
            {"image": data_url(TALL)},
            {"text": "a dog", "image": data_url(WIDE)},
            {"text": "a dog", "instruction": "find it"},
        ]
        answer = client.embeddings.create(model="default", input=items)
    found = np.array([one.embedding for one in answer.data])
    wanted = [["the oak"], [TALL], [WIDE, "a dog"], ["find it", "a dog"]]
    for got, pieces in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, vector_of(peer, model, list(pieces)), atol=1e-4)
    # Another picture, another vector; the same one comes from the cache of vectors.
    again = embed(server, input=[{"image": data_url(TALL)}]).json()
    np.testing.assert_allclose(again["data"][0]["embedding"], found[1], atol=1e-5)
    assert np.abs(found[1] - found[2]).max() > 1e-3


def test_messages(server: Server, peer: Any, model: Path) -> None:
    content = [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": data_url(WIDE)}},
        {"type": "text", "text": "there"},
    ]
    answer = embed(server, messages=[{"role": "user", "content": content}])
    assert answer.status_code == 200, answer.text
    wanted = vector_of(peer, model, ["look", WIDE, "there"])
    np.testing.assert_allclose(answer.json()["data"][0]["embedding"], wanted, atol=1e-4)


def test_hostile_items_are_refused_with_their_place(server: Server) -> None:
    picture_url = {"image": data_url(WIDE)}
    for body, where in (
        ({"input": [{"image": "data:image/png;base64,AAAA"}]}, "input[0].image"),
        ({"input": [picture_url, {"image": "http://127.0.0.1:1/x.png"}]}, "input[1].image"),
        ({"input": [{"image": "file:///etc/passwd"}]}, "input[0].image"),
        ({"input": [{}]}, "input[0]"),
        ({"input": [{"text": "a"}, "b"]}, "input"),
        ({"input": [{"picture": "x"}]}, "input[0].picture"),
        ({"input": [{"text": 3}]}, "input[0].text"),
        ({"input": [{"text": "a"}] * 257}, "input"),
        ({"input": "a", "messages": []}, "input"),
        ({}, "input"),
        ({"messages": []}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "messages[0].content[0]",
        ),
    ):
        answer = embed(server, **body)
        assert answer.status_code == 400, (body, answer.text)
        assert where in answer.text, (body, answer.text)
    assert embed(server, input=[picture_url]).status_code == 200


def yes_share(peer: Any, inputs: dict[str, torch.Tensor], yes: int, no: int) -> float:
    with torch.inference_mode():
        logits = peer(**inputs).logits[0, -1]
    return float(torch.softmax(logits[[yes, no]].float(), dim=0)[0])


RERANKER = (
    "{{ instruct | default('judge') }} "
    "{% for part in query %}{% if part['type'] == 'image' %}<|image_pad|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} and "
    "{% for part in document %}{% if part['type'] == 'image' %}<|image_pad|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [TEMPLATE, RERANKER], ids=["chat", "query and document"])
def test_ranks_of_documents_with_pictures(
    model: Path, peer: Any, template: str, tmp_path: Path
) -> None:
    from sapwood.frontends.native.rerank import SYSTEM

    own = tmp_path / "model"
    own.mkdir()
    for path in model.iterdir():
        (own / path.name).symlink_to(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own / name).unlink()
    files = json.loads((model / "tokenizer.json").read_text())
    vocab = files["model"]["vocab"]
    # Bytes that no text has in UTF-8 make room for two words.
    ids = {word: vocab.pop(byte) for word, byte in (("yes", "õ"), ("no", "ö"))}
    vocab |= ids
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    files["added_tokens"] += [{"id": i, "content": word, **plain} for word, i in ids.items()]
    (own / "tokenizer.json").write_text(json.dumps(files))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    documents: list[Any] = [
        "a dog",
        [{"type": "image_url", "image_url": {"url": data_url(TALL)}}],
        [
            {"type": "text", "text": "the oak "},
            {"type": "image_url", "image_url": {"url": data_url(WIDE)}},
        ],
    ]
    shown: list[list[str | Image.Image]] = [["a dog"], [TALL], ["the oak ", WIDE]]
    query = [{"type": "text", "text": "which"}]
    with serving("--model", str(own), "--dtype", "float32") as server:
        body = {"query": query, "documents": documents, "instruct": "find"}
        answer = httpx.post(f"{server.url}/v1/rerank", json=body, timeout=60)
        bad = {"query": "q", "documents": [[{"type": "image_url", "image_url": {"url": "x"}}]]}
        refused = httpx.post(f"{server.url}/v1/rerank", json=bad, timeout=60)
    assert answer.status_code == 200, answer.text
    assert refused.status_code == 400
    assert "documents[0][0]" in refused.text
    scores = {one["index"]: one["score"] for one in answer.json()}
    for index, pieces in enumerate(shown):
        if template == TEMPLATE:
            before = f"{SYSTEM}<Instruct>: find\n<Query>: which\n<Document>: "
        else:
            before = "find which and "
        inputs = prompt_of(own, [before, *pieces])
        assert scores[index] == pytest.approx(
            yes_share(peer, inputs, ids["yes"], ids["no"]), abs=1e-4
        )
