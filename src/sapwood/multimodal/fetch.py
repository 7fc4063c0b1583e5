"""The bytes of a medium: from http and https servers, data URLs, and files of one folder."""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx

from sapwood.base.errors import InvalidRequest
from sapwood.multimodal.addresses import Resolve, checked_address, system_addresses
from sapwood.multimodal.limits import MIB, MediaLimits
from sapwood.schema.media_source import MediaKind

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_LONGEST_PATH = 4096
_PORTS = {"http": 80, "https": 443}
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]+")
_LIES = ("text/", "application/json", "application/xhtml", "application/pdf", "image/svg")
"""Media types that no picture and no video has. What a server does not know it calls octet-stream,
and clients often name one picture format for another: the bytes decide between those."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetcher:
    """
    local_folder  files below it may be read; None: no files
    allowed       hosts from which alone media are fetched; empty: all on the public Internet
    """

    limits: MediaLimits = field(default_factory=MediaLimits)
    local_folder: Path | None = None
    allowed: frozenset[str] = frozenset()
    resolve: Resolve = system_addresses

    async def bytes_of(self, url: str, kind: MediaKind) -> bytes:
        """Raises InvalidRequest, worded as the end of a sentence about the medium."""
        scheme = url[:16].partition(":")[0].lower()
        if scheme == "data":
            return await asyncio.to_thread(self._of_data_url, url, kind)
        if scheme in _PORTS:
            return await self._of_server(url, kind)
        if scheme == "file":
            return await asyncio.to_thread(self._of_file, unquote(urlsplit(url).path), kind)
        if self.local_folder is not None and url.startswith("/") and len(url) < _LONGEST_PATH:
            return await asyncio.to_thread(self._of_file, url, kind)
        if len(url) >= 16 and _BASE64.fullmatch(url):
            return await asyncio.to_thread(self._of_base64, url, kind)
        raise InvalidRequest(
            f"must be an http, https or data URL, or base64, but begins with {url[:24]!r}"
        )

    def _of_data_url(self, url: str, kind: MediaKind) -> bytes:
        head, comma, text = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise InvalidRequest("is a data URL that does not have the form data:TYPE;base64,DATA")
        _check_type(head[5:], kind)
        return self._of_base64(text, kind)

    def _of_base64(self, text: str, kind: MediaKind) -> bytes:
        self._check_size(len(text) * 3 // 4 - 2, kind)
        try:
            plain = text.translate({ord("-"): "+", ord("_"): "/", 10: None, 13: None, 32: None})
            data = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise InvalidRequest("is not valid base64") from None
        if not data:
            raise InvalidRequest("is empty")
        return data

    def _of_file(self, name: str, kind: MediaKind) -> bytes:
        if self.local_folder is None:
            raise InvalidRequest(
                "is a file of the server, which reads none; send the file as a data URL, or start "
                "the server with --allowed-local-media-path"
            )
        folder = self.local_folder.resolve()
        refusal = InvalidRequest(f"is no readable file below {folder}, this server's folder")
        try:
            # What is opened is checked, not the name: a link may change in between.
            descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError):
            raise refusal from None
        opened = Path(f"/proc/self/fd/{descriptor}").readlink()
        is_regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if not is_regular or not opened.is_relative_to(folder):
            os.close(descriptor)
            raise refusal
        with os.fdopen(descriptor, "rb") as file:
            most = self.limits.max_bytes(kind)
            data = file.read(most + 1)
        self._check_size(len(data), kind)
        return data

    async def _of_server(self, url: str, kind: MediaKind) -> bytes:
        limits = self.limits
        timeout = httpx.Timeout(limits.read_s, connect=limits.connect_s)
        try:
            async with httpx.AsyncClient(
                timeout=timeout, trust_env=False, follow_redirects=False
            ) as client:
                for _ in range(limits.max_redirects + 1):
                    request = await self._request(client, url)
                    answer = await client.send(request, stream=True)
                    try:
                        if answer.status_code not in _REDIRECTS:
                            return await self._body(answer, kind)
                        url = _redirected(url, answer)
                    finally:
                        await answer.aclose()
        except httpx.TimeoutException:
            raise InvalidRequest(
                f"was not fetched: its server was silent for {limits.read_s:g} s"
            ) from None
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise InvalidRequest(f"was not fetched: {reason}"[:300]) from None
        except httpx.InvalidURL:
            raise InvalidRequest("is no valid URL") from None
        raise InvalidRequest(f"was redirected more than {limits.max_redirects} times")

    async def _request(self, client: httpx.AsyncClient, url: str) -> httpx.Request:
        """A request to the checked address, with the host's own name in TLS and in its header."""
        asked = httpx.URL(url)
        if asked.scheme not in _PORTS or not asked.host:
            raise InvalidRequest("must be an http or https URL with a host")
        port = asked.port or _PORTS[asked.scheme]
        address = await checked_address(
            asked.host, port, allowed=self.allowed, resolve=self.resolve
        )
        return client.build_request(
            "GET",
            asked.copy_with(host=address, username="", password=""),
            headers={
                "Host": asked.netloc.decode("ascii").rpartition("@")[2],
                # A compressed answer may be a thousand times as large as its bytes.
                "Accept-Encoding": "identity",
                "User-Agent": "sapwood",
            },
            extensions={"sni_hostname": asked.host},
        )

    async def _body(self, answer: httpx.Response, kind: MediaKind) -> bytes:
        if answer.status_code != 200:
            raise InvalidRequest(f"was not fetched: its server answers {answer.status_code}")
        if answer.headers.get("content-encoding", "identity").lower() != "identity":
            raise InvalidRequest("was not fetched: its server sends it compressed, unasked")
        _check_type(answer.headers.get("content-type", ""), kind)
        claimed = answer.headers.get("content-length", "")
        if claimed.isdecimal():
            self._check_size(int(claimed), kind)
        data = bytearray()
        async for piece in answer.aiter_raw():
            data += piece
            self._check_size(len(data), kind)
        return bytes(data)

    def _check_size(self, num_bytes: int, kind: MediaKind) -> None:
        most = self.limits.max_bytes(kind)
        if num_bytes > most:
            raise InvalidRequest(
                f"has more than {most / MIB:g} MiB, as much as this server takes of {_a(kind)}"
            )


def _redirected(url: str, answer: httpx.Response) -> str:
    target = answer.headers.get("location", "")
    if not target:
        raise InvalidRequest("was not fetched: its server redirects to nowhere")
    return str(httpx.URL(url).join(target))


def _check_type(media_type: str, kind: MediaKind) -> None:
    name = media_type.partition(";")[0].strip().lower()
    if name.startswith(_LIES):
        raise InvalidRequest(f"is of type {name!r}, which is no {kind}")


def _a(kind: MediaKind) -> str:
    return "a video" if kind == "video" else "a picture"
