"""How uvicorn is set up; what it does with it is tested against a real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from sapwood.app.http_server import HttpServer
from sapwood.base.errors import ConfigError
from sapwood.schema.config.server import ServerConfig


async def app(scope: object, receive: object, send: object) -> None:
    raise AssertionError("nobody calls it")


def test_tls_files_that_cannot_be_used_are_an_error_before_anything_is_served(
    tmp_path: Path,
) -> None:
    missing = ServerConfig(ssl_certfile=str(tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match="--ssl-certfile"):
        HttpServer(app, missing, lambda: None)
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    with pytest.raises(ConfigError, match="--ssl-certfile"):
        HttpServer(app, ServerConfig(ssl_certfile=str(wrong)), lambda: None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ssl_keyfile": "k"}, "--ssl-certfile"),
        ({"api_key": ""}, "--api-key"),
        ({"admin_api_key": "é"}, "--admin-api-key"),
        ({"cors_allow_origins": "app.example"}, "origin"),
        ({"cors_allow_origins": "https://app.example/path"}, "origin"),
        ({"max_json_depth": 2000}, "--max-json-depth"),
        ({"max_request_bytes": 0}, "--max-request-bytes"),
        ({"request_body_timeout": -1.0}, "--request-body-timeout"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ServerConfig(**options)


def test_origins_are_separated_by_commas() -> None:
    config = ServerConfig(cors_allow_origins="https://a.example, http://b.example:8080,")
    assert config.allowed_origins == ("https://a.example", "http://b.example:8080")


def test_a_secret_is_not_shown() -> None:
    assert "sesame" not in repr(ServerConfig(api_key="sesame", ssl_certfile="c"))
    with pytest.raises(ConfigError) as caught:
        ServerConfig(api_key=123456)  # type: ignore[arg-type]
    assert "123456" not in str(caught.value)
