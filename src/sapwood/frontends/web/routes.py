"""The chat page and the live page."""

from __future__ import annotations

from sapwood.http.endpoints import Dialect
from sapwood.http.files import files_dialect

_ADDRESSES = {"index.html": "/", "dashboard.html": "/dashboard", "favicon.svg": "/favicon.svg"}
"""Files that are not below /web/."""


def web_dialect() -> Dialect:
    return files_dialect("web", "sapwood.frontends.web", _ADDRESSES)
