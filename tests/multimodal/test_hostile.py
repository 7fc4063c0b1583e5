"""Whatever a request brings as a picture or video costs little and ends in InvalidRequest."""

from __future__ import annotations

import asyncio
import base64
import io
import struct
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from PIL import Image

from sapwood.base.errors import InvalidRequest
from sapwood.multimodal import video
from sapwood.multimodal.addresses import is_public
from sapwood.multimodal.family import FamilySetting
from sapwood.multimodal.fetch import Fetcher
from sapwood.multimodal.image import decoded
from sapwood.multimodal.job import Job
from sapwood.multimodal.limits import MediaLimits
from sapwood.multimodal.pool import PreparingPool


def _png(width: int = 40, height: int = 30, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (width, height), 120 if mode in ("L", "I;16") else None).save(out, "PNG")
    return out.getvalue()


def _bomb() -> bytes:
    """A PNG of about 200 bytes that claims 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(100_000)))
    return b"\x89PNG\r\n\x1a\n" + head + data + chunk(b"IEND", b"")


HOSTILE = {
    "bomb": (_bomb(), "30000 x 30000"),
    "truncated": (_png(400, 300)[:120], "cannot be decoded"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture of a known format"),
    "pdf with a picture in it": (b"%PDF-1.7\n" + _png(), "no picture of a known format"),
    "text": (b"hello world, no picture", "no picture of a known format"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "no picture of a known format"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pictures_are_refused(name: str) -> None:
    data, reason = HOSTILE[name]
    with pytest.raises(InvalidRequest, match=reason):
        decoded(data, max_pixels=89_000_000)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert decoded(_png(mode=mode), max_pixels=10_000).shape == (30, 40, 3)


def test_transparent_parts_are_white() -> None:
    assert (decoded(_png(mode="RGBA"), max_pixels=10_000) == 255).all()


def test_a_picture_of_16_bits_keeps_its_brightness() -> None:
    out = io.BytesIO()
    Image.new("I;16", (4, 4), 0x8000).save(out, "PNG")
    assert (decoded(out.getvalue(), max_pixels=100) == 0x80).all()


def test_a_picture_is_turned_as_its_exif_says() -> None:
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(out, "JPEG", exif=exif)
    assert decoded(out.getvalue(), max_pixels=10_000).shape == (40, 30, 3)


def test_a_list_of_files_is_no_video(tmp_path: Path) -> None:
    secret = tmp_path / "secret.ts"
    secret.write_bytes(bytes(188))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n"
    with pytest.raises(InvalidRequest):
        video.clip_of(playlist.encode(), lambda total, fps: [0], max_pixels=10_000, max_frames=10)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "::1", "fe80::1", "fd00::1",
     "0.0.0.0", "::ffff:127.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::", "224.0.0.1"],
)  # fmt: skip
def test_addresses_inside_the_network_are_not_public(address: str) -> None:
    assert not is_public(address)
    assert is_public("93.184.215.14")
    assert is_public("2606:4700::1111")


async def _loopback(host: str, port: int) -> Sequence[str]:
    return ["127.0.0.1"]


@asynccontextmanager
async def _server(answer: bytes, *, pause_s: float = 0.0) -> AsyncIterator[int]:
    handlers = set[asyncio.Task[None]]()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(pause_s)
            writer.write(answer)
            await writer.drain()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
    await asyncio.gather(*handlers)


def _answer(data: bytes, headers: str = "") -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n{headers}\r\n"
    return head.encode() + data


def _fetcher(**changes: object) -> Fetcher:
    limits = MediaLimits(max_image_bytes=1000, read_s=0.2)
    fields = {"limits": limits, "allowed": frozenset({"pictures.test"}), "resolve": _loopback}
    return Fetcher(**(fields | changes))  # type: ignore[arg-type]


async def _refused(fetcher: Fetcher, url: str, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        await fetcher.bytes_of(url, "image")


async def _fetch_all() -> None:
    picture = _png()
    async with _server(_answer(picture)) as port:
        url = f"http://pictures.test:{port}/a.png"
        assert await _fetcher().bytes_of(url, "image") == picture
        await _refused(_fetcher(allowed=frozenset()), url, "not on the public Internet")
        await _refused(_fetcher(), f"http://other.test:{port}/", "names only")
    redirect = b"HTTP/1.1 302 Found\r\nLocation: http://inside.test/\r\nContent-Length: 0\r\n\r\n"
    async with _server(redirect) as port:
        await _refused(_fetcher(), f"http://pictures.test:{port}/", "inside.test")
    around = b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"
    async with _server(around) as port:
        await _refused(_fetcher(), f"http://pictures.test:{port}/", "more than 3 times")
    async with _server(_answer(bytes(2000))) as port:
        await _refused(_fetcher(), f"http://pictures.test:{port}/", "MiB")
    async with _server(_answer(picture, "Content-Type: text/html\r\n")) as port:
        await _refused(_fetcher(), f"http://pictures.test:{port}/", "text/html")
    async with _server(_answer(picture), pause_s=0.5) as port:
        await _refused(_fetcher(), f"http://pictures.test:{port}/", "silent")


def test_servers_are_fetched_within_limits() -> None:
    asyncio.run(_fetch_all())


def test_data_urls_and_files(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(_png())
    (tmp_path / "secret.png").write_bytes(_png())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    encoded = base64.b64encode(_png()).decode()

    async def run() -> None:
        fetcher = _fetcher(local_folder=folder)
        for url in (f"data:image/png;base64,{encoded}", encoded, f"file://{folder}/a.png"):
            assert await fetcher.bytes_of(url, "image") == _png()
        for name in ("link.png", "../secret.png", ".", "missing"):
            await _refused(fetcher, f"file://{folder}/{name}", "no readable file")
        await _refused(_fetcher(), f"file://{folder}/a.png", "--allowed-local-media-path")
        await _refused(fetcher, "data:image/svg+xml;base64,AAAA", "svg")
        await _refused(fetcher, "data:image/png;base64,%%%", "not valid base64")
        await _refused(fetcher, f"data:image/png;base64,{'A' * 4000}", "MiB")
        await _refused(fetcher, "ftp://pictures.test/a.png", "http, https or data")

    asyncio.run(run())


def test_the_pool_prepares_and_survives_what_is_hostile() -> None:
    async def run() -> None:
        setting = FamilySetting(model_type="qwen2_vl")
        pool = PreparingPool(setting, MediaLimits(memory_bytes=2**28), num_copies=2)
        try:
            good = [pool.prepare(Job(id=0, kind="image"), [_png()]) for _ in range(3)]
            first, second, third = await asyncio.gather(*good)
            assert first.digest == second.digest == third.digest
            assert first.counts == (6,)
            other = await pool.prepare(Job(id=0, kind="image"), [_png(41, 30)])
            assert other.digest != first.digest
            for data, reason in HOSTILE.values():
                with pytest.raises(InvalidRequest, match=reason):
                    await pool.prepare(Job(id=0, kind="image"), [data])
            deep = io.BytesIO()
            Image.new("RGB", (9000, 9000)).save(deep, "PNG")
            with pytest.raises(InvalidRequest, match=r"needs more than|failed|cannot be decoded"):
                await pool.prepare(Job(id=0, kind="image"), [deep.getvalue()])
            assert (await pool.prepare(Job(id=0, kind="image"), [_png()])).digest == first.digest
        finally:
            pool.close()

    asyncio.run(run())
