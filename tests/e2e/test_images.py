"""Pictures through OpenAI's official client, against transformers."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import numpy as np
import ollama
import openai
import pytest
import tokenizers
import torch
from PIL import Image

from tests.e2e.server import Server, serving
from tests.pictures import data_url, picture
from tests.seeing import IMAGE
from tests.served_sight import save_served


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("qwen2_vl"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with serving("--model", str(model), "--dtype", "float32") as one:
        yield one


def _ask(server: Server, *urls: str) -> Any:
    parts: list[Any] = [{"type": "text", "text": "what is"}]
    for url in urls:
        parts += [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": " ?"}]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        return client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": parts}],
            temperature=0,
            max_tokens=8,
            logprobs=True,
            extra_body={"ignore_eos": True, "skip_special_tokens": False},
        )


def test_a_picture_is_answered_as_transformers_does(server: Server, model: Path) -> None:
    from transformers import AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    pictures = [picture(70, 50), picture(33, 90)]
    answer = _ask(server, *map(data_url, pictures))
    processor = Qwen2VLImageProcessorPil.from_pretrained(model)
    shown = processor(pictures, return_tensors="pt")
    counts = (shown["image_grid_thw"].prod(1) // processor.merge_size**2).tolist()
    backend = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = backend.encode("what is").ids
    for count in counts:
        ids += [*[IMAGE] * count, *backend.encode(" ?").ids]
    oracle = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    prompt = torch.tensor([ids])
    kinds = (prompt == IMAGE).int()
    with torch.no_grad():
        told = oracle.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            mm_token_type_ids=kinds,
            **shown,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    expected = [float(one[0].log_softmax(-1).max()) for one in told.logits]
    found = [entry.logprob for entry in answer.choices[0].logprobs.content]
    assert answer.usage.prompt_tokens == len(ids)
    assert np.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/svg+xml;base64,AAAA",
        "data:image/png;base64,aGVsbG8gd29ybGQsIG5vIHBpY3R1cmU=",
        "http://127.0.0.1:1/a.png",
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
    ],
)
def test_hostile_urls_are_refused_with_their_place(server: Server, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        _ask(server, url)
    assert "messages[0].content[1]" in str(refused.value)


def _data(shown: Image.Image) -> str:
    return data_url(shown).partition(",")[2]


def _post(server: Server, path: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def _by_chat(server: Server, url: str) -> str:
    parts = [
        {"type": "text", "text": "what is"},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
    ]
    body = {
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_tokens": 6,
    }
    answer = _post(server, "/v1/chat/completions", body)
    details = answer["usage"]["prompt_tokens_details"]
    assert 0 < details["image_tokens"] < answer["usage"]["prompt_tokens"]
    return str(answer["choices"][0]["message"]["content"])


def _by_responses(server: Server, url: str) -> str:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.responses.create(
            model="default",
            input=[
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "what is"},
                        {"type": "input_image", "image_url": url, "detail": "auto"},
                    ],
                }
            ],
            temperature=0,
            max_output_tokens=6,
        )
        assert answer.usage is not None
        assert answer.usage.input_tokens_details.image_tokens > 0
        items = client.responses.input_items.list(answer.id)
        assert "input_image" in str(items.data[0])
    return answer.output_text


def _by_anthropic(server: Server, url: str) -> str:
    source: Any = {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}
    messages: list[Any] = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what is"},
                {"type": "image", "source": source},
            ],
        }
    ]
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        answer = client.messages.create(
            model="default", messages=messages, max_tokens=6, extra_body={"temperature": 0}
        )
        counted = client.messages.count_tokens(model="default", messages=messages)
    usage = answer.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    return answer.content[0].text


def _by_ollama_chat(server: Server, url: str) -> str:
    data = base64.b64decode(url.partition(",")[2])
    with ollama.Client(host=server.url) as client:
        answer = client.chat(
            model="default",
            messages=[
                {"role": "system", "content": "what is"},
                {"role": "user", "content": "", "images": [data]},
            ],
            options={"temperature": 0, "num_predict": 6},
        )
    return str(answer.message.content)


def _by_ollama_generate(server: Server, url: str) -> str:
    with ollama.Client(host=server.url) as client:
        answer = client.generate(
            model="default",
            system="what is",
            prompt="",
            images=[url.partition(",")[2]],
            options={"temperature": 0, "num_predict": 6},
        )
    return str(answer.response)


def _by_native(server: Server, prompt: dict[str, Any]) -> str:
    sampling = {"temperature": 0, "max_new_tokens": 6}
    answer = _post(server, "/generate", {**prompt, "sampling_params": sampling})
    assert answer["meta_info"]["image_tokens"] > 0
    return str(answer["text"])


def _by_native_text(server: Server, url: str) -> str:
    return _by_native(
        server, {"text": "what is<|image_pad|>", "image_data": url, "modalities": ["image"]}
    )


def _by_native_ids(server: Server, url: str) -> str:
    ids = _post(server, "/tokenize", {"prompt": "what is<|image_pad|>"})["tokens"]
    return _by_native(server, {"input_ids": ids, "image_data": [[{"url": url}]]})


def _by_native_places(server: Server, url: str) -> str:
    """The prompt has a token for each vector already, as a processor writes it."""
    one = _post(server, "/tokenize", {"prompt": "what is<|image_pad|>"})["tokens"]
    count = _post(
        server,
        "/generate",
        {"input_ids": one, "image_data": url, "sampling_params": {"max_new_tokens": 1}},
    )["meta_info"]["image_tokens"]
    at = one.index(IMAGE)
    ids = [*one[:at], *[IMAGE] * count, *one[at + 1 :]]
    return _by_native(server, {"input_ids": ids, "image_data": url.partition(",")[2]})


@pytest.mark.parametrize(
    "ask",
    [
        _by_responses,
        _by_anthropic,
        _by_ollama_chat,
        _by_ollama_generate,
        _by_native_text,
        _by_native_ids,
        _by_native_places,
    ],
)
def test_every_dialect_shows_the_model_the_samepicture(
    server: Server, ask: Callable[[Server, str], str]
) -> None:
    url = data_url(picture(62, 44))
    said = _by_chat(server, url)
    before = server.counters()
    assert _by_chat(server, url) == said
    between = server.counters()
    assert ask(server, url) == said
    after = server.counters()
    # Nothing is encoded, and as much of the prompt is found: it is the same to the last token.
    assert after["media"]["num_encoded"] == before["media"]["num_encoded"]
    saved = [one["num_cached_tokens"] for one in (before, between, after)]
    assert (saved[2] - saved[1]) % (saved[1] - saved[0]) == 0 < saved[2] - saved[1]


def test_a_batch_has_pictures_for_each_of_its_prompts(server: Server) -> None:
    first, second = data_url(picture(40, 40)), data_url(picture(41, 56))
    texts = ["a<|image_pad|>", "b<|image_pad|>c<|image_pad|>"]
    sampling = {"temperature": 0, "max_new_tokens": 4}

    def asked(text: Any, images: Any) -> Any:
        body = {"text": text, "image_data": images, "sampling_params": sampling}
        return _post(server, "/generate", body)

    both = asked(texts, [[first], [second, first]])
    alone = [asked(texts[0], first), asked(texts[1], [second, first])]
    assert [one["text"] for one in both] == [one["text"] for one in alone]
    shared = asked([texts[0], texts[0] + "?"], first)
    assert shared[0]["text"] == alone[0]["text"]
    mixed = asked(["only text", texts[0]], [None, first])
    assert "image_tokens" not in mixed[0]["meta_info"]
    assert mixed[1]["text"] == alone[0]["text"]


def test_a_tool_result_shows_itspicture(server: Server) -> None:
    shot = _data(picture(50, 50))
    source: Any = {"type": "base64", "media_type": "image/png", "data": shot}
    messages: list[Any] = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": [_USE]},
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "a",
                    "content": [
                        {"type": "text", "text": "seen:"},
                        {"type": "image", "source": source},
                    ],
                }
            ],
        },
    ]
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        shown = client.messages.count_tokens(model="default", messages=messages)
        del messages[2]["content"][0]["content"][1]
        unshown = client.messages.count_tokens(model="default", messages=messages)
    assert shown.input_tokens > unshown.input_tokens + 1


_USE = {"type": "tool_use", "id": "a", "name": "shot", "input": {}}


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0]",
        ),
        (
            "/v1/messages",
            {
                "max_tokens": 1,
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}],
                    }
                ],
            },
            "messages[0].content[0].source",
        ),
        ("/api/chat", {"messages": [{"role": "user", "images": ["!"]}]}, "messages[0].images[0]"),
        ("/api/generate", {"prompt": "a", "images": ["http://127.0.0.1/"]}, "images[0]"),
        ("/generate", {"text": "a", "image_data": [["x"], 7]}, "image_data"),
        ("/generate", {"text": "a", "image_data": {"format": "nothing"}}, "image_data"),
        ("/generate", {"text": "a<|image_pad|>", "image_data": ["/etc/passwd"]}, "image_data[0]"),
        ("/generate", {"text": ["a", "b"], "image_data": ["x"]}, "image_data"),
        ("/generate", {"input_ids": [IMAGE] * 3, "image_data": "AAAA" * 9}, "image_data"),
        ("/generate", {"text": "a", "image_data": ["AAAA"] * 10_000}, "image_data[64]"),
        (
            "/v1/chat/completions",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "data:,"}}] * 10_000,
                    }
                ]
            },
            "messages[0].content[64]",
        ),
    ],
)
def test_hostile_media_of_every_dialect_are_refused_by_place(
    server: Server, path: str, body: dict[str, Any], where: str
) -> None:
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert where in answer.text
