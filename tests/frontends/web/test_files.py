from __future__ import annotations

import pytest


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
    tag = api.get("/web/chat.js").headers["etag"]
    response = api.get("/web/chat.js", headers={"if-none-match": tag})
    assert response.status_code == 304
    assert response.content == b""


def test_the_page_names_nothing_outside_the_server(api):
    for path in ("/", "/web/chat.css", "/web/chat.js", "/web/markdown.js"):
        assert "//" not in api.get(path).text.replace("// ", "").replace("w3.org", "")
    for path in ("/web/chat.js", "/web/markdown.js"):
        assert "innerHTML" not in api.get(path).text
