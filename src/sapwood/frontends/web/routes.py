"""The chat page, the page that draws, and their live pages."""

from __future__ import annotations

from sapwood.http.endpoints import Dialect
from sapwood.http.files import files_dialect

_PACKAGE = "sapwood.frontends.web"
_EVERYWHERE = {"favicon.svg": "/favicon.svg"}
_CHATS = {"index.html": "/", "dashboard.html": "/dashboard", "pictures.html": "/pictures"}
_DRAWS = {"pictures.html": "/", "painting.html": "/dashboard"}
"""Files that are not below /web/."""


def web_dialect() -> Dialect:
    return files_dialect("web", _PACKAGE, _CHATS | _EVERYWHERE)


def painting_web_dialect() -> Dialect:
    """Of a server that draws."""
    return files_dialect("web", _PACKAGE, _DRAWS | _EVERYWHERE)
