"""Files of web pages, read once at start.

Pages of servers and of the gateway share the files in `static` beside this module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath

from starlette.requests import Request
from starlette.responses import Response

from sapwood.http.endpoints import Dialect, Endpoint, Handler

_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".woff2": "font/woff2",
}

# No inline script or style and nothing from elsewhere: script that came in with an answer cannot
# run. Markup becomes nodes in one place only, DOMPurify, whose policy has that name.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify"
)

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # The browser asks every time, so that a page never runs with another version's script.
    "Cache-Control": "no-cache",
}


def files_dialect(name: str, package: str, addresses: Mapping[str, str]) -> Dialect:
    """The files in the folder `static` of a package, and those that all pages share, below /web/.
    They hold nothing secret, and ask for the key.

    addresses  of files that are elsewhere
    """
    dialect = Dialect(name)
    for each in ("sapwood.http", package):
        for path, file in _files(resources.files(each).joinpath("static")):
            address = addresses.get(path, f"/web/{path}")
            media_type = _MEDIA_TYPES[PurePosixPath(path).suffix]
            # HEAD / is how Ollama's programs look whether the server is there.
            methods = ("GET", "HEAD")
            endpoint = Endpoint(
                paths=(address,), methods=methods, access="open", is_documented=False
            )
            handler = file_handler(file.read_bytes(), media_type, policy=_POLICY)
            dialect.serves(endpoint)(handler)
    return dialect


def _files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    """The files below a folder that browsers ask for, with their paths from there."""
    for entry in sorted(folder.iterdir(), key=lambda one: one.name):
        name = f"{prefix}{entry.name}"
        if entry.is_dir():
            yield from _files(entry, f"{name}/")
        elif PurePosixPath(name).suffix in _MEDIA_TYPES:
            yield name, entry


def file_handler(content: bytes, media_type: str, *, policy: str) -> Handler:
    """Answers with a file, unless the browser has it already.

    policy  what the page may load: its Content-Security-Policy
    """
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {**_HEADERS, "Content-Security-Policy": policy, "ETag": tag}

    async def serve(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return serve
