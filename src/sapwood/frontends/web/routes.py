"""The files of the chat page and the live page, read once at start."""

from __future__ import annotations

import hashlib
from importlib import resources

from fastapi import Request, Response

from sapwood.frontends.common.endpoints import Dialect, Endpoint, Handler

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/web/chat.css": ("chat.css", "text/css; charset=utf-8"),
    "/web/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "/web/markdown.js": ("markdown.js", "text/javascript; charset=utf-8"),
    "/dashboard": ("dashboard.html", "text/html; charset=utf-8"),
    "/web/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    "/web/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}

_HEADERS = {
    # No inline script and nothing from elsewhere: script that came in with an answer cannot run.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # The browser asks every time, so that a page never runs with another version's script.
    "Cache-Control": "no-cache",
}


def web_dialect() -> Dialect:
    """The pages hold nothing secret, and ask for the key."""
    dialect = Dialect("web")
    folder = resources.files("sapwood.frontends.web").joinpath("static")
    for path, (name, media_type) in _FILES.items():
        content = folder.joinpath(name).read_bytes()
        # HEAD / is how Ollama's programs look whether the server is there.
        methods = ("GET", "HEAD")
        file = Endpoint(paths=(path,), methods=methods, access="open", is_documented=False)
        dialect.serves(file)(_serve(content, media_type))
    return dialect


def _serve(content: bytes, media_type: str) -> Handler:
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {**_HEADERS, "ETag": tag}

    async def serve(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return serve
