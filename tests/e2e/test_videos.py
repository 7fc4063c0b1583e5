"""`sapwood serve` of a tiny random Wan, asked by OpenAI's client, compared with diffusers."""

from __future__ import annotations

import io
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
from tests.painting_models import saved, wan

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

ASKED: dict[str, Any] = {"num_frames": 5, "num_inference_steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(wan("ti2v"), tmp_path_factory.mktemp("models") / "tiny-wan")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    kept = str(tmp_path_factory.mktemp("kept"))
    with serving("--model", str(folder), "--output-path", kept) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_openais_client_makes_polls_downloads_lists_remixes_and_deletes(
    client: openai.OpenAI, folder: Path
) -> None:
    more = {"extra_body": {**ASKED, "output_format": "frames"}}
    size: Any = "48x32"
    video = client.videos.create_and_poll(prompt="an oak", size=size, poll_interval_ms=50, **more)
    assert (video.status, video.progress, video.size) == ("completed", 100, "48x32")
    frames = io.BytesIO(client.videos.download_content(video.id).read())
    assert_same(frames, by_diffusers(folder))
    again = client.videos.remix(video.id, prompt="an elm")
    assert client.videos.poll(again.id, poll_interval_ms=50).remixed_from_video_id == video.id
    assert [one.id for one in client.videos.list(limit=1)] == [again.id, video.id]
    for own in (video, again):
        assert client.videos.delete(own.id).deleted
    assert list(client.videos.list()) == []
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def by_diffusers(folder: Path) -> np.ndarray:
    """[frames, H, W, 3]"""
    import diffusers

    peer: Any = diffusers.WanPipeline
    pipeline = peer.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        "an oak",
        width=48,
        height=32,
        num_frames=5,
        num_inference_steps=2,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="np",
    )
    return np.asarray((drawn.frames[0] * 255).round())


def assert_same(zipped: io.BytesIO, theirs: np.ndarray) -> None:
    """Within one grey level."""
    import zipfile

    with zipfile.ZipFile(zipped) as archive:
        names = sorted(archive.namelist())
        ours = np.stack([np.array(Image.open(io.BytesIO(archive.read(one)))) for one in names])
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert theirs.std() > 5, "a video of one colour would prove nothing"


def test_the_server_goes_on_after_what_it_refuses(server: Server) -> None:
    for body in (
        {"num_frames": 0},
        {"num_frames": 242},
        {"size": "8x4"},
        {"guidance_scale_2": 2.0},
        {"true_cfg_scale": 2.0},
    ):
        asked = {"prompt": "an oak", "size": "48x32", **ASKED, **body}
        answer = httpx.post(f"{server.url}/v1/videos", json=asked, timeout=30.0)
        if answer.status_code == 200:
            # Only the pipeline knows: the job says why it failed.
            job = answer.json()
            while job["status"] in ("queued", "in_progress"):
                job = httpx.get(f"{server.url}/v1/videos/{job['id']}").json()
            assert job["status"] == "failed", body
            assert job["error"]["message"]
        else:
            assert answer.status_code == 400, answer.text
    assert httpx.get(f"{server.url}/health").status_code == 200
