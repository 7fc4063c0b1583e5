"""What the flags about pictures and videos do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, ClassVar

import pytest
from msgspec.structs import replace

from sapwood.app.serving.media import _changed, build_fetcher, build_preparer
from sapwood.base.errors import ConfigError, InvalidRequest
from sapwood.multimodal.family import FamilySetting
from sapwood.multimodal.fetch import Fetcher
from sapwood.multimodal.job import Result
from sapwood.multimodal.preparer import MediaPreparer, _media
from sapwood.schema.config.media import MediaConfig
from sapwood.schema.config.options import gather
from sapwood.schema.config.vision import VisionConfig
from sapwood.schema.media import MediaTensor
from sapwood.schema.media_source import MediaKind, MediaSource


def test_files_are_read_below_the_folder_alone_and_up_to_the_limit(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    (folder / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"1")
    fetcher = build_fetcher(
        MediaConfig(allowed_local_media_path=str(folder), max_image_bytes=5, max_video_bytes=4)
    )
    assert asyncio.run(fetcher.bytes_of(f"file://{folder}/a", "image")) == b"12345"
    with pytest.raises(InvalidRequest):
        asyncio.run(fetcher.bytes_of(f"file://{folder}/a", "video"))
    with pytest.raises(InvalidRequest, match="no readable file below"):
        asyncio.run(fetcher.bytes_of(f"file://{tmp_path}/b", "image"))


def test_only_named_hosts_are_fetched() -> None:
    fetcher = build_fetcher(MediaConfig(allowed_media_domains="One.example, two.example"))
    with pytest.raises(InvalidRequest, match=r"names only one\.example, two\.example"):
        asyncio.run(fetcher.bytes_of("http://three.example/a.png", "image"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"limit_mm_data_per_request": "{"},
        {"limit_mm_data_per_request": '{"sound": 1}'},
        {"limit_mm_data_per_request": '{"image": -1}'},
        {"mm_max_concurrent_calls": 0},
        {"mm_per_request_timeout": 0.0},
        {"max_image_bytes": 0},
        {"allowed_local_media_path": "/no/such/folder"},
    ],
)
def test_wrong_values_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--" + next(iter(wrong)).replace("_", "-")):
        MediaConfig(**wrong)


class _Slow(Fetcher):
    """Counts what is fetched at a time, and refuses it."""

    busy: ClassVar[list[int]] = []
    most = 0

    async def bytes_of(self, url: str, kind: MediaKind) -> bytes:
        _Slow.busy.append(1)
        _Slow.most = max(_Slow.most, len(_Slow.busy))
        await asyncio.sleep(0.005)
        _Slow.busy.pop()
        raise InvalidRequest("is refused")


def test_further_requests_wait_for_those_whose_media_are_fetched() -> None:
    setting = FamilySetting(
        model_type="qwen2_vl",
        image={},
        video={},
        processor={},
        model={},
        tokens={"image": "<|image_pad|>", "video": "<|video_pad|>"},
    )

    async def encode(text: str, is_whole: bool) -> list[int]:
        return []

    async def run() -> None:
        preparer = MediaPreparer(
            setting,
            _Slow(),
            token_ids={"image": 1},
            num_copies=1,
            timeout_s=5,
            most_of_kind={"image": 1},
            max_calls=2,
        )
        source = MediaSource(kind="image", url="x", where="here")
        with pytest.raises(InvalidRequest, match="--limit-mm-data-per-request"):
            await preparer.prepare("", [source, source], encode)
        calls = [preparer.prepare("", [source], encode) for _ in range(6)]
        told = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(one, InvalidRequest) for one in told)
        preparer.close()

    asyncio.run(run())
    assert _Slow.most == 2


def test_settings_take_the_place_of_the_models_own() -> None:
    own = {"patch_size": 14, "max_pixels": 9}
    assert _changed(own, {"max_pixels": 4}, "image") == {"patch_size": 14, "max_pixels": 4}
    assert _changed(own, {"fps": 1}, "video")["fps"] == 1
    with pytest.raises(ConfigError, match="shiny for image"):
        _changed(own, {"shiny": True}, "image")
    for wrong in ("[]", "{", '{"sound": {}}', '{"image": 3}'):
        with pytest.raises(ConfigError, match="--mm-process-config"):
            MediaConfig(mm_process_config=wrong)


def test_options_of_media_are_refused_where_there_are_none(tmp_path: Path) -> None:
    given = MediaConfig(allowed_local_media_path=str(tmp_path), max_image_bytes=7)
    with pytest.raises(ConfigError, match="--allowed-local-media-path, --max-image-bytes"):
        build_preparer(tmp_path, {}, None, given, language_only=True)  # type: ignore[arg-type]


def test_the_cache_of_vectors_has_sglangs_variable_too() -> None:
    env = {"SGLANG_VLM_CACHE_SIZE_MB": "7"}
    assert gather([VisionConfig], flags={}, env=env, file={}) == {"vlm_cache_size_mb": 7}
    env["SAPWOOD_VLM_CACHE_SIZE_MB"] = "8"
    assert gather([VisionConfig], flags={}, env=env, file={}) == {"vlm_cache_size_mb": 8}


def test_tiles_that_a_tower_sees_alone_are_media_of_their_own() -> None:
    pixels = MediaTensor(dtype="float32", shape=(3, 2), data=bytes(range(24)))
    result = Result(digest=bytes(32), tensors={"pixel_values": pixels}, counts=(4, 4, 4), parts=3)
    spans = [(1, 4), (6, 4), (11, 4)]
    parts = list(_media("image", result, spans))
    assert [one.spans for one in parts] == [((1, 4),), ((6, 4),), ((11, 4),)]
    assert [one.tensors["pixel_values"].shape for one in parts] == [(1, 2)] * 3
    assert b"".join(one.tensors["pixel_values"].data for one in parts) == pixels.data
    assert len({one.digest for one in parts}) == 3
    whole = list(_media("image", replace(result, parts=1), spans))
    assert [one.spans for one in whole] == [tuple(spans)]
