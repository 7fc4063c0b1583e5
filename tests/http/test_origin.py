"""A page of another origin cannot use the server through its visitor's browser."""

from __future__ import annotations

import pytest

from sapwood.http.origin import why_refused

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
WITH_EFFECT = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/generate"),
    ("PUT", "/generate"),
    ("POST", "/abort_request"),
    ("POST", "/flush_cache"),
    ("GET", "/flush_cache"),
    ("GET", "/health_generate"),
    ("POST", "/tokenize"),
    ("DELETE", "/generate"),
    ("POST", "/no/such/route"),
]
HOSTILE = [
    {"sec-fetch-site": "cross-site", "origin": "https://evil.example"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site", "origin": "http://test:8080"},
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://test:8080"},
    {"origin": "http://test.evil.example"},
]
FRIENDLY = [
    {},
    {"sec-fetch-site": "same-origin", "origin": "http://test"},
    {"sec-fetch-site": "none"},
    {"origin": "http://test"},
    # A proxy that ends TLS and rewrites Host: the browser's own word counts.
    {"sec-fetch-site": "same-origin", "origin": "https://chat.example.com"},
]


@pytest.mark.parametrize("headers", HOSTILE)
@pytest.mark.parametrize(("method", "path"), WITH_EFFECT)
def test_pages_of_other_origins_are_refused(api, engine, method, path, headers):
    response = api.request(method, path, headers=headers, content=b"{}")
    assert response.status_code == 403
    body = response.json()
    error = body if path.startswith("/v1/") else body["error"]
    assert error["type"] == "PermissionDeniedError"
    assert headers.get("origin", "another site") in error["message"]
    assert engine.submitted == []


@pytest.mark.parametrize("headers", FRIENDLY)
def test_programs_and_the_servers_own_page_pass(api, headers):
    assert api.post("/v1/chat/completions", CHAT, headers=headers).status_code == 200
    assert api.post("/flush_cache", {}, headers=headers).status_code == 200


@pytest.mark.parametrize("headers", HOSTILE)
@pytest.mark.parametrize(
    "path", ["/", "/health", "/v1/models", "/openapi.json", "/web/chat/main.js"]
)
def test_what_only_tells_is_told_to_all(api, path, headers):
    """Another origin's page may load it but, without CORS headers, not read it."""
    response = api.get(path, headers=headers)
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


def test_a_form_of_another_site_gets_nowhere(api, engine):
    """What a browser sends without asking first: a simple POST with a form's content type."""
    response = api.request(
        "POST",
        "/v1/chat/completions",
        content='{"messages": [{"role": "user", "content": "Hi"}]}',
        headers={
            "content-type": "text/plain",
            "origin": "https://evil.example",
            "sec-fetch-site": "cross-site",
            "sec-fetch-mode": "no-cors",
        },
    )
    assert response.status_code == 403
    assert engine.submitted == []


def test_the_port_is_part_of_the_origin():
    assert why_refused({"origin": "http://localhost:30000", "host": "localhost:30000"}) is None
    assert why_refused({"origin": "http://localhost:3000", "host": "localhost:30000"}) is not None
