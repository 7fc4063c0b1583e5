"""A page that gives its own name to this server's address gets nothing, and others are let be."""

from __future__ import annotations

import pytest

from sapwood.app.serving.http_server import access_of
from sapwood.http.access import Access
from sapwood.http.known_hosts import is_known, is_loopback
from sapwood.schema.config.server import ServerConfig

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
LOCAL = Access(is_local=True)
SAME_ORIGIN = {"sec-fetch-site": "same-origin", "origin": "http://evil.example:30000"}


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:30000",
        "LOCALHOST.:30000",
        "app.localhost",
        "127.0.0.1:30000",
        "127.1:30000",
        "192.168.1.5",
        "0.0.0.0:80",
        "[::1]:30000",
        "[fe80::1%25eth0]",
        "sapwood:30000",
        "host.docker.internal:30000",
        "box.local",
        "sapwood.default.svc.cluster.local",
        "box.home.arpa",
        "",
    ],
)
def test_addresses_and_private_names_are_known(host):
    assert is_known(host)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:30000",
        "evil.example.",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evillocalhost.example",
        "[::1].evil.example",
        "local.evil.example:127",
    ],
)
def test_other_names_are_not(host):
    assert not is_known(host)
    assert is_known(host, ["*"])


def test_names_may_be_allowed_one_by_one_or_below_a_domain():
    assert is_known("LLM.example.com:443", ["llm.example.com"])
    assert not is_known("a.llm.example.com", ["llm.example.com"])
    assert is_known("a.b.example.com", ["*.example.com"])
    assert not is_known("evilexample.com", ["*.example.com"])
    assert not is_known("example.com", ["*.example.com"])


@pytest.mark.parametrize("headers", [SAME_ORIGIN, {}, {"origin": "http://evil.example:30000"}])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/flush_cache"),
        ("GET", "/"),
    ],
)
def test_a_page_with_a_rebound_name_is_refused(guarded, engine, method, path, headers):
    """Without TLS a browser sends no Sec-Fetch-Site, and no Origin with a GET."""
    api = guarded(access=LOCAL)
    headers = {**headers, "host": "evil.example:30000"}
    response = api.request(method, path, headers=headers, json=CHAT)
    assert response.status_code == 403
    error = response.json()
    assert "--allowed-hosts" in error.get("message", error.get("error", {}).get("message", ""))
    assert engine.submitted == []


@pytest.mark.parametrize("host", ["localhost:30000", "127.0.0.1:30000", "[::1]:30000", "sapwood"])
def test_curl_and_sdks_on_the_same_machine_pass(guarded, host):
    assert guarded(access=LOCAL).get("/v1/models", headers={"host": host}).status_code == 200


def test_where_others_reach_the_server_only_browsers_are_asked_for_its_name(guarded):
    api = guarded(access=Access(is_local=False))
    host = {"host": "gpu1.corp.example.com:30000"}
    page = {"origin": "http://gpu1.corp.example.com:30000"}
    assert api.post("/v1/chat/completions", CHAT, headers=host).status_code == 200
    assert api.post("/v1/chat/completions", CHAT, headers=host | page).status_code == 403
    named = guarded(access=Access(allowed_hosts=("*.corp.example.com",)))
    assert named.post("/v1/chat/completions", CHAT, headers=host | page).status_code == 200


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.0.0.5", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("box.example.com", False),
    ],
)
def test_which_addresses_only_the_machine_itself_reaches(host, expected):
    assert is_loopback(host) == expected
    assert access_of(ServerConfig(host=host)).is_local == expected


@pytest.mark.parametrize(
    "options",
    [{"api_key": "k"}, {"ssl_certfile": "cert.pem"}, {"cors_allow_origins": "*"}],
)
def test_nothing_is_asked_where_rebinding_brings_nothing(options):
    assert access_of(ServerConfig(**options)).allowed_hosts == ("*",)


def test_an_admin_key_alone_leaves_the_other_routes_open():
    assert "*" not in access_of(ServerConfig(admin_api_key="k")).allowed_hosts


def test_the_option_and_the_name_that_it_listens_on_are_known():
    access = access_of(
        ServerConfig(host="box.example.com", allowed_hosts="a.example, *.b.example,")
    )
    assert access.allowed_hosts == ("a.example", "*.b.example", "box.example.com")
