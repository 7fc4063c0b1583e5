"""Pictures through OpenAI's official client, against transformers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tokenizers
import torch
from PIL import Image

from tests.e2e.server import Server, serving
from tests.seeing import FAMILIES, IMAGE, VIDEO, save

TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<|image_pad|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save(tmp_path_factory.mktemp("qwen2_vl"), FAMILIES["Qwen2-VL"])
    vision = json.loads((directory / "config.json").read_text())["vision_config"]
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_special_tokens(["<|video_pad|>", "<|image_pad|>"])
    assert backend.token_to_id("<|image_pad|>") == IMAGE
    assert backend.token_to_id("<|video_pad|>") == VIDEO
    backend.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    settings = {
        "patch_size": vision["patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "min_pixels": 64,
        "max_pixels": 4096,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with serving("--model", str(model), "--dtype", "float32") as one:
        yield one


def _picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3))
    return Image.fromarray(noise.astype(np.uint8))


def _url(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


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

    pictures = [_picture(70, 50), _picture(33, 90)]
    answer = _ask(server, *map(_url, pictures))
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
