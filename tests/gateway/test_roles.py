"""Callers with names and roles in front of a gateway, what each may send, and what is logged."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest

from sapwood.base.errors import ConfigError
from sapwood.gateway.caller_rates import CallerRates
from sapwood.http.callers import Caller, Role
from sapwood.http.errors import TooManyRequests
from sapwood.schema.config.gateway import GatewayConfig
from tests.gateway.stubs import Bench, Stub, bench

KEYS = "1:ann:admin:key:with:colons, 2:ben:user:bens-key"
ANN, BEN = {"x-api-key": "key:with:colons"}, {"authorization": "Bearer bens-key"}


def test_roles_decide_what_a_key_opens(caplog: pytest.LogCaptureFixture) -> None:
    async def run(made: Bench, stub: Stub) -> None:
        client = made.client
        for headers, status in (({}, 401), ({"x-api-key": "no"}, 401), (BEN, 200), (ANN, 200)):
            assert (await made.post(headers=headers)).status_code == status
        assert "authorization" not in stub.posts[0].headers
        for headers, status in (({}, 401), (BEN, 403), (ANN, 200)):
            answer = await client.get("/workers", headers=headers)
            assert answer.status_code == status
        refused = await client.get("/workers", headers=BEN)
        assert "ben (2) has the role user" in refused.text
        assert (await client.get("/health")).status_code == 200

    async def whole() -> None:
        async with bench(stub := Stub("a"), control_plane_api_keys=KEYS) as made:
            await run(made, stub)

    with caplog.at_level(logging.INFO, "sapwood.gateway.audit"):
        asyncio.run(whole())
    told = [
        record.getMessage() for record in caplog.records if record.name == "sapwood.gateway.audit"
    ]
    assert told[2].startswith(
        "GET /workers answered with 200; caller ann (1), role admin, from 127"
    )
    assert len(told) == 4
    assert "bens-key" not in caplog.text


def test_with_roles_the_api_key_is_a_users(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        options = {"control_plane_api_keys": KEYS, "api_key": "shared"}
        async with bench(Stub("a"), disable_audit_logging=True, **options) as made:
            shared = {"x-api-key": "shared"}
            assert (await made.post(headers=shared)).status_code == 200
            assert (await made.client.get("/workers", headers=shared)).status_code == 403
            assert (await made.client.get("/workers", headers=ANN)).status_code == 200

    with caplog.at_level(logging.INFO, "sapwood.gateway.audit"):
        asyncio.run(run())
    assert not [record for record in caplog.records if record.name == "sapwood.gateway.audit"]


def test_each_caller_has_a_rate_of_its_own() -> None:
    async def run() -> None:
        options = {"control_plane_api_keys": KEYS, "rate_limit_per_key": 2.0}
        async with bench(Stub("a"), **options) as made:
            answers = [(await made.post(headers=BEN)).status_code for _ in range(3)]
            assert answers == [200, 200, 429]
            refused: httpx.Response = await made.post("/v1/messages", headers=BEN)
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert (await made.post(headers=ANN)).status_code == 200
            assert (await made.client.get("/health")).status_code == 200

    asyncio.run(run())


def test_callers_that_are_forgotten_are_those_of_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sapwood.gateway.caller_rates.MOST_CALLERS", 2)

    async def run() -> None:
        rates = CallerRates(0.001)
        callers = [Caller(name, Role.USER) for name in "abc"]
        for caller in callers:
            await rates.take(caller)
        with pytest.raises(TooManyRequests, match="c may send"):
            await rates.take(callers[2])
        await rates.take(callers[0])  # forgotten, so its bucket is full again
        assert len(rates._buckets) == 2

    asyncio.run(run())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"control_plane_api_keys": "1:ann:root:secret"}, "entry 1"),
        ({"control_plane_api_keys": "secret"}, "entry 1"),
        ({"control_plane_api_keys": "1:a:user:x,1:b:user:y"}, "same id"),
        ({"control_plane_api_keys": "1:a:user:x,2:b:user:x"}, "same key"),
        ({"jwt_audience": "a"}, "--jwt-issuer"),
        ({"jwt_issuer": "https://i"}, "--jwt-audience"),
        ({"jwt_issuer": "https://i", "jwt_audience": "a", "jwt_role_mapping": "a=root"}, "a=root"),
        ({"rate_limit_per_key": 1.0}, "needs keys"),
        ({"rate_limit_per_key": -1.0, "api_key": "k"}, "> 0"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        GatewayConfig(**options)  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)
