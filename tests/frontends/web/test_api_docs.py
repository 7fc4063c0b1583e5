"""The files of the page at /docs."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/docs", "text/html"),
        ("/docs/start.css", "text/css"),
        ("/docs/start.js", "text/javascript"),
        ("/docs/swagger-ui.css", "text/css"),
        ("/docs/swagger-ui-bundle.js", "text/javascript"),
    ],
)
def test_files_are_served_with_their_type_and_a_strict_policy(api, path, media_type):
    response = api.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(media_type)
    policy = response.headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    tag = response.headers["etag"]
    assert api.get(path, headers={"if-none-match": tag}).status_code == 304
