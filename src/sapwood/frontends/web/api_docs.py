"""The page at /docs: all routes, to read and to try, in Swagger UI.

The package fastapi-swagger brings Swagger UI's files, so the page needs no network."""

from __future__ import annotations

from importlib import resources

from sapwood.http.endpoints import Dialect, Endpoint
from sapwood.http.files import file_handler

_OWN, _SWAGGER_UI = "sapwood.frontends.web.api", "fastapi_swagger.resources"

_FILES = {
    "/docs": (_OWN, "docs.html", "text/html; charset=utf-8"),
    "/docs/start.css": (_OWN, "start.css", "text/css; charset=utf-8"),
    "/docs/start.js": (_OWN, "start.js", "text/javascript; charset=utf-8"),
    "/docs/swagger-ui.css": (_SWAGGER_UI, "swagger-ui.css", "text/css; charset=utf-8"),
    "/docs/swagger-ui-bundle.js": (
        _SWAGGER_UI,
        "swagger-ui-bundle.js",
        "text/javascript; charset=utf-8",
    ),
}

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Only images may be part of the style sheet itself: Swagger UI has its icons there."""


def api_docs_dialect() -> Dialect:
    """The page holds nothing secret, and asks for the key."""
    dialect = Dialect("api docs")
    for path, (package, name, media_type) in _FILES.items():
        content = resources.files(package).joinpath(name).read_bytes()
        file = Endpoint(paths=(path,), methods=("GET",), access="open", is_documented=False)
        dialect.serves(file)(file_handler(content, media_type, policy=_POLICY))
    return dialect
