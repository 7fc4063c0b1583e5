"""The routes for videos over an engine that draws one colour; what requests bring is hostile."""

from __future__ import annotations

import asyncio
import base64
import io
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image
from starlette.testclient import TestClient

from sapwood.base.clock import ManualClock
from sapwood.frontends.images.server import create_painting_app
from sapwood.frontends.images.services import PaintingServices
from sapwood.frontends.images.stored import PictureStore
from sapwood.frontends.videos.records import VideoStore
from sapwood.http.body import BodyLimits
from sapwood.schema.config.painting import PaintingConfig
from sapwood.schema.painting import (
    Paint,
    PaintDone,
    PainterReady,
    PaintEvent,
    PaintFailed,
    PaintProgress,
    Picture,
    PictureDefaults,
    PipelineTraits,
    VideoDefaults,
)


class OneColour:
    """Frames of the seed's level; the prompt "slow" waits, "bad" fails."""

    unavailable_reason: str | None = None
    info = PainterReady(
        pipeline="OneColour",
        backend="sapwood",
        traits=PipelineTraits(
            defaults=PictureDefaults(width=16, height=16, num_inference_steps=2),
            size_multiple=8,
            video=VideoDefaults(num_frames=5, fps=10, frame_step=4),
        ),
        components=(),
        notes=(),
    )

    def __init__(self) -> None:
        self.asked: list[Paint] = []
        self.num_given_up = 0

    async def paint(self, request: Paint) -> AsyncIterator[PaintEvent]:
        self.asked.append(request)
        own, options = request.request_id, request.options
        yield PaintProgress(request_id=own, step=1, num_steps=2)
        try:
            while request.prompt == "slow":
                await asyncio.sleep(0.01)
        except (asyncio.CancelledError, GeneratorExit):
            self.num_given_up += 1
            raise
        if request.prompt == "bad":
            yield PaintFailed(
                request_id=own, kind="late", message="too late", status=504, error_type="Timeout"
            )
            return
        frames = options.num_frames or 1
        width, height = options.width or 16, options.height or 16
        level = bytes([request.seed % 256]) * (frames * width * height * 3)
        video = Picture(width=width, height=height, channels=3, pixels=level, num_frames=frames)
        yield PaintDone(request_id=own, picture=video, num_steps=2, queue_s=0.0, paint_s=0.1)


class World:
    """A server with its folder; `restarted` is another server on the same folder."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.folder, self.config = folder, config
        self.engine, self.now_s = OneColour(), 1000.0

    def app(self) -> TestClient:
        config = PaintingConfig(
            max_picture_pixels=4096, max_video_frames=40, max_waiting_pictures=3, **self.config
        )
        store = VideoStore(
            self.folder,
            max_bytes=config.max_stored_video_bytes,
            max_age_s=config.stored_video_age,
            max_kept=config.max_kept_videos,
            now=lambda: self.now_s,
        )
        services = PaintingServices(
            engine=self.engine,  # type: ignore[arg-type]
            config=config,
            store=PictureStore(self.folder, max_bytes=10_000, max_age_s=60.0, clock=ManualClock()),
            model_name="one-colour",
            model_path="/models/one-colour",
            created=0,
            version="0",
        )
        limits = BodyLimits(max_bytes=200_000)
        return TestClient(
            create_painting_app(services, store, body_limits=limits), base_url="http://localhost"
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def client(world: World) -> Iterator[TestClient]:
    with world.app() as one:
        yield one


def create(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/videos", json={"prompt": "a tree", **body})


def until(client: TestClient, video_id: str, is_it: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = client.get(f"/v1/videos/{video_id}").json()
        if is_it(found):
            return found
        time.sleep(0.01)
    raise AssertionError(f"it never came: {found}")


def finished(client: TestClient, **body: Any) -> Any:
    made = create(client, **body)
    assert made.status_code == 200, made.text
    return until(client, made.json()["id"], lambda job: job["status"] in ("completed", "failed"))


def png(side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (200, 10, 10)).save(file, "PNG")
    return file.getvalue()


def refused(answer: Any, param: str, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    assert answer.json()["param"] == param
    return str(answer.json()["message"])


def test_a_job_is_told_of_and_becomes_an_mp4(client: TestClient, world: World) -> None:
    made = create(client, seed=7, seconds="1", size="32x16").json()
    assert made["status"] in ("queued", "in_progress")
    assert (made["object"], made["seconds"], made["size"]) == ("video", "1", "32x16")
    done = until(client, made["id"], lambda job: job["status"] == "completed")
    assert (done["progress"], done["num_frames"], done["fps"]) == (100, 10, 10)
    assert done["expires_at"] == done["completed_at"] + 86400
    answer = client.get(f"/v1/videos/{made['id']}/content")
    assert answer.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(answer.content)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 10)
    assert len(frames) == 10
    assert frames[0].shape == (16, 32, 3)
    assert abs(int(frames[3].mean()) - 7) <= 3
    for variant, kind in (("thumbnail", "WEBP"), ("spritesheet", "JPEG")):
        raw = client.get(f"/v1/videos/{made['id']}/content", params={"variant": variant}).content
        assert Image.open(io.BytesIO(raw)).format == kind


@pytest.mark.parametrize("kind", ["webm", "gif", "frames"])
def test_other_formats_have_all_frames(kind: str, client: TestClient) -> None:
    done = finished(client, seed=200, output_format=kind)
    answer = client.get(f"/v1/videos/{done['id']}/content")
    if kind == "webm":
        with av.open(io.BytesIO(answer.content)) as container:
            assert container.streams.video[0].codec_context.name == "vp9"
            assert len(list(container.decode(video=0))) == 5
    elif kind == "gif":
        # Equal frames are one for Pillow, which then lasts as long.
        assert Image.open(io.BytesIO(answer.content)).info["duration"] == 500
    else:
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            assert archive.namelist() == [f"{place:05}.png" for place in range(5)]
            picture = Image.open(io.BytesIO(archive.read("00004.png")))
            assert picture.getpixel((0, 0)) == (200, 200, 200)


def test_the_first_frame_comes_as_a_file_or_as_a_data_url(client: TestClient, world: World) -> None:
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    for answer in (
        client.post(
            "/v1/videos",
            data={"prompt": "a tree", "seconds": "2", "size": "16x16"},
            files={"input_reference": ("a.png", png(), "image/png")},
        ),
        client.post(
            "/v1/videos",
            # A file without a name is a field, and makes the body a form.
            files={"prompt": (None, "a tree"), "input_reference[image_url]": (None, url)},
        ),
        create(client, input_reference={"image_url": url}),
        create(client, input_reference=url),
    ):
        assert answer.status_code == 200, answer.text
        until(client, answer.json()["id"], lambda job: job["status"] == "completed")
    for paint in world.engine.asked:
        (picture,) = paint.options.pictures
        assert (picture.width, picture.height) == (8, 8)
        assert picture.pixels[:3] == bytes((200, 10, 10))


def test_lists_go_page_by_page(client: TestClient, world: World) -> None:
    ids = []
    for _ in range(5):
        world.now_s += 1
        ids.append(finished(client)["id"])
    page = client.get("/v1/videos", params={"limit": 2}).json()
    assert [one["id"] for one in page["data"]] == [ids[4], ids[3]]
    assert page["has_more"]
    page = client.get("/v1/videos", params={"limit": 2, "after": page["last_id"]}).json()
    assert [one["id"] for one in page["data"]] == [ids[2], ids[1]]
    page = client.get("/v1/videos", params={"order": "asc", "after": ids[1]}).json()
    assert [one["id"] for one in page["data"]] == ids[2:]
    assert not page["has_more"]
    refused(client.get("/v1/videos", params={"after": "video_none"}), "after")
    refused(client.get("/v1/videos", params={"limit": "0"}), "limit")


def test_what_is_deleted_is_gone_and_paints_no_more(client: TestClient, world: World) -> None:
    done, slow = finished(client), create(client, prompt="slow").json()
    until(client, slow["id"], lambda job: job["status"] == "in_progress")
    for video_id in (done["id"], slow["id"]):
        answer = client.delete(f"/v1/videos/{video_id}")
        assert answer.json() == {"id": video_id, "object": "video.deleted", "deleted": True}
        assert client.get(f"/v1/videos/{video_id}").status_code == 404
        assert client.get(f"/v1/videos/{video_id}/content").status_code == 404
    for _ in range(100):
        if world.engine.num_given_up:
            break
        time.sleep(0.01)
    assert world.engine.num_given_up == 1
    assert list(world.folder.iterdir()) == []


def test_a_remix_has_the_noise_and_the_picture_of_the_first(
    client: TestClient, world: World
) -> None:
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    first = finished(client, seed=9, input_reference=url, guidance_scale=2.5)
    answer = client.post(f"/v1/videos/{first['id']}/remix", json={"prompt": "an oak"})
    again = until(client, answer.json()["id"], lambda job: job["status"] == "completed")
    assert again["remixed_from_video_id"] == first["id"]
    one, other = world.engine.asked
    assert (other.prompt, other.seed, other.options) == ("an oak", 9, one.options)
    failed = finished(client, prompt="bad")
    refused(client.post(f"/v1/videos/{failed['id']}/remix", json={"prompt": "x"}), "video_id")


def test_failures_are_told(client: TestClient) -> None:
    failed = finished(client, prompt="bad")
    assert failed["error"] == {"code": "Timeout", "message": "too late"}
    answer = client.get(f"/v1/videos/{failed['id']}/content")
    assert answer.status_code == 404
    assert "failed" in answer.json()["message"]


def test_a_restart_loses_no_finished_job_and_says_what_became_of_the_others(
    world: World,
) -> None:
    with world.app() as client:
        done = finished(client, seed=3)
        slow = create(client, prompt="slow").json()
        until(client, slow["id"], lambda job: job["status"] == "in_progress")
        content = client.get(f"/v1/videos/{done['id']}/content").content
    (world.folder / "video_nonsense.json").write_text("{")
    with world.app() as client:
        assert client.get(f"/v1/videos/{done['id']}").json() == done
        assert client.get(f"/v1/videos/{done['id']}/content").content == content
        interrupted = client.get(f"/v1/videos/{slow['id']}").json()
        assert interrupted["status"] == "failed"
        assert interrupted["error"]["code"] == "interrupted"
        assert len(client.get("/v1/videos").json()["data"]) == 2
        world.now_s += 86401
        assert client.get("/v1/videos").json()["data"] == []
    assert [path.name for path in world.folder.iterdir()] == ["video_nonsense.json"]


def test_bytes_and_numbers_of_kept_videos_are_bounded(tmp_path: Path) -> None:
    world = World(tmp_path, max_kept_videos=3)
    with world.app() as client:
        ids = []
        for _ in range(6):
            world.now_s += 1
            ids.append(finished(client)["id"])
        kept = [
            one["id"] for one in client.get("/v1/videos", params={"order": "asc"}).json()["data"]
        ]
        assert kept == ids[-3:]
    used = sum(path.stat().st_size for path in tmp_path.glob("video_*") if path.suffix != ".json")
    small = World(tmp_path, max_stored_video_bytes=used // 2)
    with small.app() as client:
        assert [one["id"] for one in client.get("/v1/videos").json()["data"]] == [ids[-1]]


def test_no_more_jobs_are_open_than_may_wait(client: TestClient) -> None:
    slow = [create(client, prompt="slow") for _ in range(3)]
    assert [answer.status_code for answer in slow] == [200] * 3
    assert create(client).status_code == 503
    for answer in slow:
        client.delete(f"/v1/videos/{answer.json()['id']}")
    assert create(client).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"num_frames": 41}, "num_frames"),
        ({"num_frames": 2**31}, "num_frames"),
        ({"seconds": 100}, "num_frames"),
        ({"seconds": 2**40}, "seconds"),
        ({"seconds": "four"}, "seconds"),
        ({"fps": 0}, "fps"),
        ({"fps": 121}, "fps"),
        ({"fps": 10, "seconds": 3, "num_frames": 5}, "seconds"),
        ({"size": "65x64"}, "size"),
        ({"size": "999999x999999"}, "size"),
        ({"size": "0x16"}, "size"),
        ({"num_inference_steps": 10**6}, "num_inference_steps"),
        ({"prompt": "x" * 40_000}, "prompt"),
        ({"output_format": "avi"}, "output_format"),
        ({"input_reference": "/etc/passwd"}, "input_reference"),
        ({"input_reference": "http://localhost/a.png"}, "input_reference"),
        ({"input_reference": {"file_id": "file_1"}}, "input_reference"),
        ({"input_reference": "data:image/png;base64,%%%"}, "input_reference"),
        ({"input_reference": "data:image/png;base64,AAAA"}, "input_reference"),
        ({"output_path": "/tmp"}, "output_path"),
        ({"enable_teacache": True}, "enable_teacache"),
        ({"seed": -1}, "seed"),
        ({"bogus": 1}, "bogus"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    body: dict[str, Any], param: str, client: TestClient, world: World
) -> None:
    assert refused(create(client, **body), param)
    assert world.engine.asked == []
    assert list(world.folder.iterdir()) == []


def test_a_bomb_as_first_frame_is_refused(client: TestClient) -> None:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    answer = client.post(
        "/v1/videos",
        data={"prompt": "a tree"},
        files={"input_reference": ("a.png", file.getvalue(), "image/png")},
    )
    assert "20000x20000" in refused(answer, "input_reference")


def test_a_path_is_no_id(client: TestClient) -> None:
    for video_id in ("..%2Fsecret", "video_" + "f" * 32, "x" * 5000):
        assert client.get(f"/v1/videos/{video_id}").status_code == 404
        assert client.get(f"/v1/videos/{video_id}/content").status_code == 404
        assert client.delete(f"/v1/videos/{video_id}").status_code == 404


def test_the_image_routes_draw_one_frame(client: TestClient, world: World) -> None:
    answer = client.post("/v1/images/generations", json={"prompt": "a tree", "size": "16x16"})
    assert answer.status_code == 200
    assert world.engine.asked[0].options.num_frames == 1
