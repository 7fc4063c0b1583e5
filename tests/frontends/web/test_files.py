from __future__ import annotations

import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[3] / "src" / "sapwood"
OWN = [
    file
    for room in ("frontends/web", "gateway", "http")
    for file in sorted((SOURCE / room / "static").rglob("*.*"))
    if file.is_file() and "libraries" not in file.parts
]


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html"),
        ("/web/theme.js", "text/javascript"),
        ("/web/chat/chat.css", "text/css"),
        ("/web/chat/main.js", "text/javascript"),
        ("/web/libraries/libraries.js", "text/javascript"),
        ("/web/libraries/fonts/KaTeX_Main-Regular.woff2", "font/woff2"),
        ("/web/libraries/LICENSES.txt", "text/plain"),
        ("/dashboard", "text/html"),
        ("/favicon.svg", "image/svg+xml"),
    ],
)
def test_files_are_served_with_their_type_and_a_strict_policy(api, path, media_type):
    response = api.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(media_type)
    assert "script-src 'self'" in response.headers["content-security-policy"]
    assert "unsafe" not in response.headers["content-security-policy"]


def test_an_unchanged_file_is_not_sent_again(api):
    tag = api.get("/web/chat/main.js").headers["etag"]
    response = api.get("/web/chat/main.js", headers={"if-none-match": tag})
    assert response.status_code == 304
    assert response.content == b""


@pytest.mark.parametrize("file", OWN, ids=lambda file: file.name)
def test_our_own_files_name_nothing_outside_and_parse_no_markup(file):
    text = file.read_text("utf-8")
    assert not re.search(r"(?:https?:)?//(?!www\.w3\.org/)\w", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text)
    assert len(text.splitlines()) <= 300


def test_there_are_own_files_to_look_at():
    assert len(OWN) > 15


def test_the_policy_lets_one_place_alone_parse_markup(api):
    policy = api.get("/").headers["content-security-policy"]
    assert "require-trusted-types-for 'script'; trusted-types dompurify" in policy
