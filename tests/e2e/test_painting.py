"""`sapwood serve` of a tiny random Flux, asked by OpenAI's client, compared with diffusers."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.e2e.server import Server, serving
from tests.painting_models import flux, saved

SIZE = "64x48"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(flux(), tmp_path_factory.mktemp("models") / "tiny-flux")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    flags = ("--model", str(folder), "--served-model-name", "tiny-flux", "--enable-metrics")
    with serving(*flags, "--max-inference-steps", "400") as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def by_diffusers(folder: Path, prompt: str, *, seed: int, steps: int) -> np.ndarray:
    """The picture [H, W, 3] that diffusers draws."""
    import diffusers

    peer: Any = diffusers.FluxPipeline
    pipeline = peer.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        prompt,
        width=64,
        height=48,
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(seed),
    )
    return np.array(drawn.images[0])


def pixels(b64: str | None) -> np.ndarray:
    assert b64 is not None
    return np.array(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Within one grey level."""
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    assert theirs.std() > 5, "a picture of one colour would prove nothing"


def test_two_pictures_have_the_seeds_in_a_row_and_are_those_of_diffusers(
    client: openai.OpenAI, folder: Path
) -> None:
    answer = client.images.generate(
        prompt="an oak",
        n=2,
        size=SIZE,
        response_format="b64_json",
        extra_body={"seed": 7, "num_inference_steps": 4},
    )
    assert answer.data is not None
    for place, item in enumerate(answer.data):
        want = by_diffusers(folder, "an oak", seed=7 + place, steps=4)
        assert_same(pixels(item.b64_json), want)
    told = answer.model_dump()
    assert told["inference_time_s"] > 0
    assert told["peak_memory_mb"] > 0


def test_a_picture_that_joins_another_at_a_later_step_is_that_of_diffusers(
    client: openai.OpenAI, server: Server, folder: Path
) -> None:
    """The first picture has many steps; the second joins when it has taken some of them."""
    has_begun = threading.Event()

    def first() -> np.ndarray:
        events = client.images.generate(
            prompt="a wood",
            size=SIZE,
            stream=True,
            partial_images=3,
            extra_body={"seed": 3, "num_inference_steps": 200},
        )
        for event in events:
            has_begun.set()
            last = event
        assert last.type == "image_generation.completed"
        return pixels(last.b64_json)

    with ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(first)
        assert has_begun.wait(60)
        answer = client.images.generate(
            prompt="an oak",
            size=SIZE,
            response_format="b64_json",
            extra_body={"seed": 7, "num_inference_steps": 4},
        )
        assert not drawn.done(), "both were drawn at the same time"
        assert answer.data is not None
        assert_same(
            pixels(answer.data[0].b64_json), by_diffusers(folder, "an oak", seed=7, steps=4)
        )
        assert_same(drawn.result(120), by_diffusers(folder, "a wood", seed=3, steps=200))
    metrics = httpx.get(f"{server.url}/metrics").text
    assert count(metrics, "num_trajectory_steps_total") > count(metrics, "num_steps_total"), (
        "pictures at different steps shared calls of the transformer"
    )


def count(metrics: str, name: str) -> float:
    (line,) = [one for one in metrics.splitlines() if one.startswith(f"sapwood:painting_{name}{{")]
    return float(line.rpartition(" ")[2])


def test_a_stream_shows_pictures_on_the_way(client: openai.OpenAI) -> None:
    events = list(
        client.images.generate(
            prompt="an oak",
            size=SIZE,
            stream=True,
            partial_images=2,
            extra_body={"seed": 7, "num_inference_steps": 4},
        )
    )
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert all(pixels(event.b64_json).shape == (48, 64, 3) for event in events)


@pytest.mark.parametrize(
    ("output_format", "media_type"),
    [("png", "image/png"), ("jpeg", "image/jpeg"), ("webp", "image/webp")],
)
def test_a_url_leads_to_the_picture(
    client: openai.OpenAI, output_format: Any, media_type: str
) -> None:
    answer = client.images.generate(
        prompt="an oak",
        size=SIZE,
        output_format=output_format,
        extra_body={"seed": 7, "num_inference_steps": 1},
    )
    assert answer.data is not None
    url = answer.data[0].url
    assert url is not None
    assert url.endswith(f"/v1/images/{answer.model_dump()['id']}/content")
    found = httpx.get(url)
    assert (found.status_code, found.headers["content-type"]) == (200, media_type)
    assert Image.open(io.BytesIO(found.content)).size == (64, 48)


def test_a_body_of_sglang_is_taken_as_it_is(server: Server) -> None:
    body = {
        "prompt": "an oak",
        "model": "tiny-flux",
        "n": 1,
        "quality": "auto",
        "response_format": "b64_json",
        "size": SIZE,
        "style": "vivid",
        "background": "auto",
        "output_format": "png",
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "seed": 1024,
        "generator_device": "cpu",
        "enable_teacache": False,
        "diffusers_kwargs": None,
    }
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"][0]["seed"] == 1024


def test_a_lora_adds_from_when_it_is_set_until_it_is_unmerged(
    server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    path = "transformer_blocks.0.attn.to_v"
    generator = torch.Generator().manual_seed(0)
    numbers = {
        f"transformer.{path}.lora_A.weight": torch.randn(4, 32, generator=generator),
        f"transformer.{path}.lora_B.weight": torch.randn(32, 4, generator=generator),
    }
    save_file(numbers, tmp_path / "ink.safetensors")

    def draw() -> np.ndarray:
        answer = client.images.generate(
            prompt="an oak",
            size=SIZE,
            response_format="b64_json",
            extra_body={"seed": 7, "num_inference_steps": 2},
        )
        assert answer.data is not None
        return pixels(answer.data[0].b64_json)

    plain = draw()
    wish = {"lora_nickname": "ink", "lora_path": str(tmp_path / "ink.safetensors")}
    answer = httpx.post(f"{server.url}/v1/set_lora", json=wish, timeout=60)
    assert answer.status_code == 200, answer.text
    drawn = draw()
    assert np.abs(drawn.astype(int) - plain.astype(int)).max() > 3
    listed = httpx.get(f"{server.url}/v1/list_loras").json()
    assert listed["active"]["transformer"][0]["nickname"] == "ink"
    httpx.post(f"{server.url}/v1/unmerge_lora_weights", json={}).raise_for_status()
    assert np.array_equal(draw(), plain)
    httpx.post(f"{server.url}/v1/merge_lora_weights", json={}).raise_for_status()
    assert np.array_equal(draw(), drawn)
    httpx.post(f"{server.url}/v1/unmerge_lora_weights", json={}).raise_for_status()
    bad = httpx.post(f"{server.url}/v1/set_lora", json=wish | {"lora_path": "/etc/passwd"})
    assert (bad.status_code, bad.json()["param"]) == (400, "lora_path")


def test_what_the_server_says_of_itself(server: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == ["tiny-flux"]
    info = httpx.get(f"{server.url}/model_info").json()
    assert (info["pipeline"], info["backend"]) == ("FluxPipeline", "sapwood")
    assert {part["name"] for part in info["components"]} == {
        "text_encoder",
        "text_encoder_2",
        "transformer",
        "vae",
    }
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_a_client_that_leaves_ends_its_picture(server: Server) -> None:
    body = {"prompt": "an oak", "size": "96x96", "num_inference_steps": 400}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=1.0)
    for _ in range(100):
        text = httpx.get(f"{server.url}/metrics").text
        if count(text, "num_denoising") == 0 and count(text, "num_waiting") == 0:
            break
        threading.Event().wait(0.1)
    assert count(text, "num_denoising") == 0
    assert 'end="aborted",model_name="tiny-flux"} 1.0' in text


def test_edits_are_refused_by_name_where_the_pipeline_only_draws(client: openai.OpenAI) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    with pytest.raises(openai.BadRequestError, match="FluxPipeline draws from a prompt alone"):
        client.images.edit(image=("a.png", file.getvalue()), prompt="an oak")


def test_options_of_language_models_are_refused_by_name(folder: Path) -> None:
    from click.testing import CliRunner

    from sapwood.app.cli.serve import serve
    from sapwood.base.errors import ConfigError

    result = CliRunner().invoke(serve, [str(folder), "--tool-call-parser", "hermes"])
    assert isinstance(result.exception, ConfigError)
    assert "--tool-call-parser" in result.exception.message
