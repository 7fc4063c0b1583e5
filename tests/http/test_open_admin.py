"""Without a key, only the server's own machine steers the server."""

from __future__ import annotations

import pytest

from sapwood.app.serving.http_server import access_of
from sapwood.http.access import Access
from sapwood.schema.config.server import ServerConfig


@pytest.mark.parametrize(
    ("options", "is_refused"),
    [
        ({}, False),
        ({"host": "::1"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "192.168.1.5"}, True),
        ({"host": "0.0.0.0", "allow_open_admin": True}, False),
    ],
)
def test_where_admins_need_a_key(options, is_refused):
    assert access_of(ServerConfig(**options)).refuses_open_admin is is_refused


def test_every_route_for_admins_is_refused_with_the_way_out(guarded):
    api = guarded(access=Access(refuses_open_admin=True))
    rows = [(endpoint, path) for endpoint in api.app.state.endpoints for path in endpoint.paths]
    admin = [(one.methods[0], path) for one, path in rows if one.access == "admin"]
    assert len(admin) > 20
    for method, path in admin:
        answer = api.request(method, path.replace("{", "").replace("}", ""))
        assert answer.status_code == 403, path
        assert "--admin-api-key" in answer.text
        assert "--allow-open-admin" in answer.text


def test_users_and_health_checks_are_let_be(guarded):
    api = guarded(access=Access(refuses_open_admin=True))
    assert api.get("/health").status_code == 200
    assert api.get("/v1/models").status_code == 200


def test_a_key_opens_them(guarded):
    api = guarded(access=Access(api_key="open", refuses_open_admin=True))
    headers = {"authorization": "Bearer open"}
    assert api.post("/flush_cache", headers=headers).status_code == 200
