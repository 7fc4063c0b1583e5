"""Keys, and that a guard never stands between a client's leaving and its request's end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sapwood.http.access import Access, Guarded
from sapwood.http.endpoints import Dialect, Endpoint, EndpointTable

KEY, ADMIN = "user-key", "admin-key"
ASK = {"text": "Hi", "sampling_params": {"max_new_tokens": 2}}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "path", ["/", "/dashboard", "/favicon.svg", "/health", "/health_generate", "/ping"]
)
def test_probes_and_the_page_need_no_key(guarded, path):
    api = guarded(access=Access(api_key=KEY, admin_api_key=ADMIN))
    assert api.get(path).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        {},
        bearer(""),
        bearer("user-ke"),
        bearer("user-key2"),
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"x-api-key": "é"},
    ],
)
def test_the_wrong_key_is_401_in_the_dialects_own_body(guarded, header):
    api = guarded(access=Access(api_key=KEY))
    encoded = {name: value.encode("latin-1") for name, value in header.items()}
    refused = api.request("POST", "/v1/completions", json={"prompt": "a"}, headers=encoded)
    assert refused.status_code == 401
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert refused.json()["type"] == "AuthenticationError"
    anthropic = api.request("POST", "/v1/messages", json={}, headers=encoded)
    assert anthropic.json()["error"]["type"] == "authentication_error"
    assert "error" in api.request("POST", "/api/chat", json={}, headers=encoded).json()


@pytest.mark.parametrize(
    "header", [bearer(KEY), {"Authorization": f"bearer  {KEY}"}, {"x-api-key": KEY}]
)
def test_the_key_opens(guarded, header):
    api = guarded(access=Access(api_key=KEY))
    assert api.request("POST", "/generate", json=ASK, headers=header).status_code == 200
    assert api.request("POST", "/flush_cache", headers=header).status_code == 200


def test_without_a_user_key_only_what_steers_needs_one(guarded):
    api = guarded(access=Access(admin_api_key=ADMIN))
    assert api.post("/generate", ASK).status_code == 200
    for path in ("/flush_cache", "/abort_request", "/configure_logging"):
        assert api.request("POST", path, json={}).status_code == 401
    assert api.request("POST", "/flush_cache", headers=bearer(ADMIN)).status_code == 200


def test_a_users_key_does_not_steer(guarded):
    api = guarded(access=Access(api_key=KEY, admin_api_key=ADMIN))
    refused = api.request("POST", "/flush_cache", headers=bearer(KEY))
    assert refused.status_code == 403
    assert "admin key" in refused.json()["error"]["message"]


def test_a_page_of_an_allowed_origin_may_ask_and_read_refusals(guarded):
    origin = {"origin": "https://app.example", "sec-fetch-site": "cross-site"}
    api = guarded(access=Access(api_key=KEY, allowed_origins=("https://app.example",)))
    preflight = {
        **origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    asked = api.request("OPTIONS", "/generate", headers=preflight)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == "https://app.example"
    answered = api.request("POST", "/generate", json=ASK, headers={**origin, **bearer(KEY)})
    assert answered.status_code == 200
    assert answered.headers["access-control-allow-origin"] == "https://app.example"
    refused = api.request("POST", "/generate", json=ASK, headers=origin)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example"
    other = {**origin, "origin": "https://evil.example", **bearer(KEY)}
    assert api.request("POST", "/generate", json=ASK, headers=other).status_code == 403


def test_an_app_behind_all_guards_is_handed_the_servers_own_channels():
    """What wraps `receive` could keep a disconnect from the route."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(receive)

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        raise AssertionError(message)

    access = Access(api_key=KEY, admin_api_key=ADMIN, allowed_origins=("*",))
    dialect = Dialect("test")
    steers = Endpoint(paths=("/steer",), methods=("POST",), access="admin", is_documented=False)
    dialect.serves(steers)(app)
    endpoints = EndpointTable([dialect])
    headers = [(b"authorization", b"Bearer admin-key"), (b"origin", b"https://a.example")]
    scope = {"type": "http", "method": "POST", "path": "/steer", "headers": headers}
    asyncio.run(Guarded(app, access=access, endpoints=endpoints)(scope, receive, send))
    assert seen == [receive]


def test_keys_are_not_shown():
    assert KEY not in repr(Access(api_key=KEY, admin_api_key=KEY))
