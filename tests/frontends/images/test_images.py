"""The routes for pictures over an engine that draws one colour; what requests bring is hostile."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

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
    LoraList,
    LorasAnswer,
    LoraWish,
    Paint,
    PaintDone,
    PainterReady,
    PainterStatus,
    PaintEvent,
    PaintFailed,
    PaintProgress,
    Picture,
    PictureDefaults,
    PipelineTraits,
)

NOTHING = LoraList(loaded_adapters=(), active={})


class OneColour:
    """Draws the level of the seed; the prompt "late" is never done."""

    unavailable_reason: str | None = None
    info = PainterReady(
        pipeline="OneColour",
        backend="sapwood",
        traits=PipelineTraits(
            defaults=PictureDefaults(width=8, height=8, num_inference_steps=2), size_multiple=8
        ),
        components=(),
        notes=(),
    )

    def __init__(self) -> None:
        self.asked: list[Paint] = []
        self.changes: list[tuple[str, dict[str, Any]]] = []

    async def paint(self, request: Paint) -> AsyncIterator[PaintEvent]:
        self.asked.append(request)
        own = request.request_id
        if request.prompt == "late":
            yield PaintFailed(
                request_id=own, kind="late", message="too late", status=504, error_type="Timeout"
            )
            return
        width, height = request.options.width or 8, request.options.height or 8
        level = bytes([request.seed % 256]) * (width * height * 3)
        picture = Picture(width=width, height=height, channels=3, pixels=level)
        for step in (1, 2):
            partial = picture if step <= request.num_partial else None
            yield PaintProgress(request_id=own, step=step, num_steps=2, partial=partial)
        yield PaintDone(request_id=own, picture=picture, num_steps=2, queue_s=0.0, paint_s=0.1)

    async def change_loras(self, kind: str, **fields: Any) -> LorasAnswer:
        self.changes.append((kind, fields))
        refusal = "no such file" if kind == "merge" else None
        return LorasAnswer(call_id="", listing=NOTHING, refusal=refusal, param="target")

    async def list_loras(self) -> LorasAnswer:
        return LorasAnswer(call_id="", listing=NOTHING)

    async def status(self) -> PainterStatus:
        counts = dict.fromkeys(PainterStatus.__struct_fields__, 0) | {"call_id": ""}
        return PainterStatus(**counts)  # type: ignore[arg-type]


@pytest.fixture
def engine() -> OneColour:
    return OneColour()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def client(engine: OneColour, clock: ManualClock, tmp_path: Path) -> Iterator[TestClient]:
    services = PaintingServices(
        engine=engine,
        config=PaintingConfig(max_picture_pixels=4096, max_inference_steps=50),
        store=PictureStore(tmp_path, max_bytes=10_000, max_age_s=60.0, clock=clock),
        model_name="one-colour",
        model_path="/models/one-colour",
        created=0,
        version="0",
        serves_metrics=True,
    )
    videos = VideoStore(
        tmp_path / "videos", max_bytes=10_000, max_age_s=60.0, max_kept=10, now=clock.now_s
    )
    app = create_painting_app(services, videos, body_limits=BodyLimits(max_bytes=200_000))
    with TestClient(app, base_url="http://localhost") as one:
        yield one


def generate(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/images/generations", json={"prompt": "a tree", **body})


def png(width: int = 8, height: int = 8, mode: str = "RGB", colour: Any = 0) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height), colour).save(file, "PNG")
    return file.getvalue()


def test_pictures_of_a_request_have_seeds_in_a_row(client: TestClient, engine: OneColour) -> None:
    answer = generate(client, n=3, seed=5, response_format="b64_json", size="16x8").json()
    assert [item["seed"] for item in answer["data"]] == [5, 6, 7]
    for item in answer["data"]:
        picture = Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))
        assert (picture.size, picture.getpixel((0, 0))) == ((16, 8), (item["seed"],) * 3)
    assert len({paint.request_id for paint in engine.asked}) == 3


def test_without_a_seed_it_is_random_and_told(client: TestClient) -> None:
    seeds = {generate(client).json()["data"][0]["seed"] for _ in range(4)}
    assert len(seeds) == 4


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"size": "65x64"}, "size", "--max-picture-pixels"),
        ({"size": "0x8"}, "size", "1 to 4096"),
        ({"size": "99999999x1"}, "size", '"auto"'),
        ({"size": "8 x 8"}, "size", '"auto"'),
        ({"n": 11}, "n", "--max-pictures-per-request"),
        ({"n": 0}, "n", ""),
        ({"num_inference_steps": 51}, "num_inference_steps", "--max-inference-steps"),
        ({"num_inference_steps": 0}, "num_inference_steps", ""),
        ({"guidance_scale": -1}, "guidance_scale", ""),
        ({"guidance_scale": 1e30}, "guidance_scale", ""),
        ({"seed": -1}, "seed", ""),
        ({"seed": 2**63}, "seed", ""),
        ({"prompt": "x" * 32_001}, "prompt", "32000"),
        ({"negative_prompt": "x" * 32_001}, "negative_prompt", "32000"),
        ({"prompt": None}, "prompt", ""),
        ({"stream": True, "n": 2}, "n", "stream"),
        ({"partial_images": 1}, "partial_images", "stream"),
        ({"stream": True, "partial_images": 4}, "partial_images", ""),
        ({"output_format": "bmp"}, "output_format", ""),
        ({"output_compression": 101}, "output_compression", ""),
        ({"timeout": 0}, "timeout", ""),
        ({"style": "natural"}, "style", "not supported"),
        ({"background": "transparent"}, "background", "not supported"),
        ({"generator_device": "cuda"}, "generator_device", "CPU"),
        ({"enable_teacache": True}, "enable_teacache", "not supported"),
        ({"diffusers_kwargs": {"a": 1}}, "diffusers_kwargs", "not supported"),
        ({"frog": 1}, None, "frog"),
    ],
)
def test_a_field_out_of_bounds_is_refused_by_name(
    client: TestClient, engine: OneColour, body: dict[str, Any], param: str | None, words: str
) -> None:
    answer = generate(client, **body)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["message"]
    if param is not None:
        assert param in answer.text
    assert engine.asked == []


def test_another_model_is_not_found(client: TestClient) -> None:
    assert generate(client, model="other").status_code == 404
    assert generate(client, model="one-colour").status_code == 200


def test_what_the_engine_refuses_has_its_status(client: TestClient) -> None:
    answer = client.post("/v1/images/generations", json={"prompt": "late", "n": 2})
    assert (answer.status_code, answer.json()["message"]) == (504, "too late")


def test_a_stream_is_openais_events(client: TestClient) -> None:
    text = generate(client, stream=True, partial_images=2, seed=1).text
    names = [line[7:] for line in text.splitlines() if line.startswith("event: ")]
    assert names == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]


def test_an_error_before_the_first_event_has_its_status(client: TestClient) -> None:
    answer = client.post("/v1/images/generations", json={"prompt": "late", "stream": True})
    assert answer.status_code == 504


def test_pictures_are_kept_for_a_while_and_within_bytes(
    client: TestClient, clock: ManualClock, tmp_path: Path
) -> None:
    first = generate(client, seed=1).json()["data"][0]["url"]
    found = client.get(first)
    assert found.headers["content-type"] == "image/png"
    assert found.headers["x-content-type-options"] == "nosniff"
    clock.advance(61)
    assert client.get(first).status_code == 404
    for seed in range(200):
        generate(client, seed=seed)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 10_000


@pytest.mark.parametrize("picture_id", ["img_0", "..%2F..%2Fetc%2Fpasswd", "x" * 5000])
def test_an_unknown_picture_is_not_found(client: TestClient, picture_id: str) -> None:
    assert client.get(f"/v1/images/{picture_id}/content").status_code == 404


# ---- edits -------------------------------------------------------------------------------------


def edit(client: TestClient, files: list[Any], **fields: str) -> Any:
    return client.post("/v1/images/edits", files=files, data={"prompt": "a tree", **fields})


def test_pictures_and_mask_reach_the_engine(client: TestClient, engine: OneColour) -> None:
    mask = Image.new("RGBA", (8, 4), (0, 0, 0, 255))
    mask.putpixel((3, 2), (0, 0, 0, 0))
    raw = io.BytesIO()
    mask.save(raw, "PNG")
    answer = edit(
        client,
        [
            ("image[]", ("a.png", png(8, 4, colour=(1, 2, 3)))),
            ("image[]", ("b.png", png(5, 6))),
            ("mask", ("m.png", raw.getvalue())),
        ],
        strength="0.5",
        seed="9",
        n="1",
    )
    assert answer.status_code == 200, answer.text
    options = engine.asked[0].options
    assert [(one.width, one.height) for one in options.pictures] == [(8, 4), (5, 6)]
    assert options.pictures[0].pixels[:3] == bytes((1, 2, 3))
    assert options.mask is not None
    assert [place for place, level in enumerate(options.mask) if level] == [2 * 8 + 3]
    assert (options.strength, engine.asked[0].seed) == (0.5, 9)


def bomb() -> bytes:
    """A png of few bytes that says that it has 50,000 x 50,000 pixels."""
    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "multipart"),
        ([("image", ("a.png", b""))], "no picture that can be read"),
        ([("image", ("a.png", png()[:40]))], "no picture that can be read"),
        ([("image", ("a.png", bomb()))], "picture"),
        ([("image", ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"))], "no picture"),
        ([("image", ("a.png", png(65, 64)))], "--max-picture-pixels"),
        ([("image", ("a.png", png())), ("mask", ("m.png", png(4, 4)))], "same size"),
        ([("image", ("a.png", png())), ("file", ("m.png", png()))], "files are"),
        ([("image", ("a.png", png()))] * 18, "form"),
        ([("mask", ("m.png", png()))], "no picture"),
    ],
)
def test_a_hostile_form_is_refused(
    client: TestClient, engine: OneColour, files: list[Any], words: str
) -> None:
    answer = edit(client, files)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["message"]
    assert engine.asked == []


def test_a_form_that_is_too_large_is_refused(client: TestClient) -> None:
    assert edit(client, [("image", ("a.png", b"x" * 300_000))]).status_code == 413


def test_a_long_field_of_a_form_is_refused(client: TestClient) -> None:
    answer = edit(client, [("image", ("a.png", png()))], negative_prompt="x" * 150_000)
    assert answer.status_code == 400


# ---- the server ----------------------------------------------------------------------------------


def test_health_follows_the_engine(client: TestClient, engine: OneColour) -> None:
    assert client.get("/health").status_code == 200
    engine.unavailable_reason = "the engine is starting"
    assert client.get("/health").status_code == 503


def test_the_document_has_the_routes(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/images/generations", "/v1/images/edits"} <= set(paths)


def test_metrics_count_pictures(client: TestClient) -> None:
    assert 'sapwood:painting_pictures_total{end="done"' in client.get("/metrics").text


# ---- LoRA ----------------------------------------------------------------------------------------


def test_bodies_of_sglang_reach_the_engine(client: TestClient, engine: OneColour) -> None:
    one = client.post("/v1/set_lora", json={"lora_nickname": "ink", "lora_path": "/ink"})
    assert (one.status_code, one.json()["status"]) == (200, "ok")
    body = {
        "lora_nickname": ["ink", "oil"],
        "lora_path": [None, "/oil"],
        "target": "transformer",
        "strength": [0.5, 2],
    }
    assert client.post("/v1/set_lora", json=body).status_code == 200
    assert [fields["wishes"] for _, fields in engine.changes] == [
        (LoraWish(nickname="ink", path="/ink"),),
        (
            LoraWish(nickname="ink", target="transformer", strength=0.5),
            LoraWish(nickname="oil", path="/oil", target="transformer", strength=2.0),
        ),
    ]
    assert client.post("/v1/unmerge_lora_weights", content=b"").status_code == 200
    assert client.get("/v1/list_loras").json() == {"loaded_adapters": [], "active": {}}
    refused = client.post("/v1/merge_lora_weights", json={"strength": 0.5})
    assert (refused.status_code, refused.json()["param"]) == (400, "target")
    assert engine.changes[-1] == ("merge", {"target": "all", "strength": 0.5})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_nickname": []}, "lora_nickname"),
        ({"lora_nickname": ["a"] * 2}, "lora_nickname"),
        ({"lora_nickname": [str(n) for n in range(33)]}, "lora_nickname"),
        ({"lora_nickname": "x" * 10_000}, "lora_nickname"),
        ({"lora_nickname": ["a", "b"], "lora_path": "/a"}, "lora_path"),
        ({"lora_nickname": ["a", "b"], "lora_path": ["/a"]}, "lora_path"),
        ({"lora_nickname": "a", "lora_path": "/a\0b"}, "lora_path"),
        ({"lora_nickname": "a", "lora_path": ""}, "lora_path"),
        ({"lora_nickname": "a", "lora_path": "x" * 5000}, "lora_path"),
        ({"lora_nickname": "a", "strength": [1.0, 2.0]}, "strength"),
        ({"lora_nickname": "a", "strength": 1e300}, "strength"),
        ({"lora_nickname": "a", "strengths": 1.0}, "strengths"),
        ({"lora_nickname": 7}, "lora_nickname"),
        ({}, "lora_nickname"),
    ],
)
def test_a_wrong_set_lora_is_refused(
    client: TestClient, engine: OneColour, body: dict[str, Any], param: str
) -> None:
    answer = client.post("/v1/set_lora", json=body)
    assert answer.status_code == 400, answer.text
    assert param in answer.json()["message"]
    assert engine.changes == []


def test_behind_a_gateway_urls_are_the_gateways(client: TestClient) -> None:
    def url(**headers: str) -> str:
        body = {"prompt": "a tree", "seed": 1}
        answer = client.post("/v1/images/generations", json=body, headers=headers).json()
        found: str = answer["data"][0]["url"]
        assert client.get(f"/v1/images/{answer['id']}").json()["media_type"] == "image/png"
        return found

    told = {"x-forwarded-host": "example.com:81", "x-forwarded-proto": "https"}
    assert url(**told).startswith("https://example.com:81/v1/images/img")
    for host in ("a b", 'x"', "x/y", "", "x" * 300):
        assert url(**{"x-forwarded-host": host}).startswith("http://localhost/v1/images/")
    assert client.get("/v1/images/none").status_code == 404
