"""Tokens of an identity provider: good ones open, all others are refused with the reason."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet, OctKey, RSAKey

from sapwood.base.errors import EngineUnavailable, SapwoodError
from sapwood.gateway import tokens
from sapwood.gateway.tokens import TokenCallers, check_url
from sapwood.http.callers import Caller, Role

ISSUER, AUDIENCE = "https://login.example.com", "gateway"
NOW = 1_800_000_000.0
RSA = RSAKey.generate_key(2048, parameters={"kid": "rsa"})
EC = ECKey.generate_key("P-256", parameters={"kid": "ec"})
STRANGE = RSAKey.generate_key(2048, parameters={"kid": "rsa"})


class Issuer:
    """Serves keys, and counts how often they are asked for."""

    def __init__(self) -> None:
        self.keys: list[Any] = [RSA, EC]
        self.answer: bytes | None = None
        self.fails = False
        self.asked: list[str] = []

    async def fetch(self, url: str) -> bytes:
        self.asked.append(url)
        await asyncio.sleep(0)
        if self.fails:
            raise OSError("no route")
        if url.endswith("openid-configuration"):
            return json.dumps({"issuer": ISSUER, "jwks_uri": f"{ISSUER}/keys"}).encode()
        assert url == f"{ISSUER}/keys"
        if self.answer is not None:
            return self.answer
        return json.dumps(KeySet(self.keys).as_dict(private=False)).encode()


class Bench:
    def __init__(self, **options: Any) -> None:
        self.issuer = Issuer()
        self.now_s = NOW
        self.callers = TokenCallers(
            issuer=ISSUER,
            audience=AUDIENCE,
            key_set_url=options.pop("key_set_url", f"{ISSUER}/keys"),
            roles={"ops": Role.ADMIN, "staff": Role.USER},
            fetch=self.issuer.fetch,
            clock=lambda: self.now_s,
            **options,
        )

    def find(self, token: str) -> Caller | None:
        return asyncio.run(self.callers.find(token))


def token(key: Any = RSA, algorithm: str = "RS256", header: Any = None, **claims: Any) -> str:
    told = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "exp": NOW + 600, "roles": ["staff"]}
    told = {name: value for name, value in (told | claims).items() if value is not None}
    head = {"alg": algorithm, "kid": key.kid} | (header or {})
    return jwt.encode(head, told, key, algorithms=[algorithm])


def test_good_tokens_name_caller_and_role() -> None:
    bench = Bench()
    assert bench.find(token()) == Caller("ann", Role.USER)
    assert bench.find(token(EC, "ES256", roles=["other", "ops"])) == Caller("ann", Role.ADMIN)
    assert bench.find(token(aud=["others", AUDIENCE], roles=None, groups="staff")) is not None
    assert len(bench.issuer.asked) == 1
    assert bench.find("an-api-key") is None


@pytest.mark.parametrize(
    ("told", "status", "reason"),
    [
        ({"exp": NOW - 61}, 401, "expired"),
        ({"exp": None}, 401, "exp"),
        ({"nbf": NOW + 120}, 401, "not yet valid"),
        ({"iss": "https://other.example.com"}, 401, "iss"),
        ({"aud": "another service"}, 401, "aud"),
        ({"aud": None}, 401, "aud"),
        ({"roles": ["intern"]}, 403, "intern"),
        ({"roles": None}, 403, "none"),
        ({"key": STRANGE}, 401, "cannot be used"),
        ({"header": {"kid": "unknown"}}, 401, "cannot be used"),
        ({"roles": ["x" * 20_000]}, 401, "16384 bytes"),
    ],
)
def test_others_are_refused(told: dict[str, Any], status: int, reason: str) -> None:
    with pytest.raises(SapwoodError, match=reason) as caught:
        Bench().find(token(**told))
    assert caught.value.status == status


def test_a_public_key_is_no_shared_secret() -> None:
    public = OctKey.import_key(base64.b64encode(RSA.as_pem(private=False)), {"kid": "rsa"})
    forged = token(public, "HS256")
    unsigned = token().rpartition(".")[0] + "."
    head = "eyJhbGciOiJub25lIn0"  # {"alg":"none"}
    for wrong in (forged, unsigned, f"{head}.{token().split('.')[1]}.", "..", "a.b.c", "é.ü.ö"):
        with pytest.raises(SapwoodError) as caught:
            Bench().find(wrong)
        assert caught.value.status == 401


def test_a_new_key_is_fetched_but_strangers_cannot_make_the_gateway_fetch() -> None:
    bench = Bench()
    bench.issuer.keys = [EC]
    assert bench.find(token(EC, "ES256")) is not None
    bench.issuer.keys = [RSA]
    for _ in range(3):  # too early to ask again
        with pytest.raises(SapwoodError):
            bench.find(token())
    assert len(bench.issuer.asked) == 1
    bench.now_s += tokens.LEAST_BETWEEN_FETCHES_S
    assert bench.find(token()) is not None
    with pytest.raises(SapwoodError, match="cannot be used"):
        bench.find(token(EC, "ES256"))  # whose key was withdrawn
    assert len(bench.issuer.asked) == 2


def test_known_keys_outlast_an_issuer_that_cannot_be_reached() -> None:
    bench = Bench()
    bench.issuer.fails = True
    with pytest.raises(EngineUnavailable, match="cannot be fetched"):
        bench.find(token())
    bench.issuer.fails = False
    bench.now_s += tokens.LEAST_BETWEEN_FETCHES_S
    assert bench.find(token()) is not None
    bench.issuer.fails = True
    bench.now_s += tokens.KEYS_LAST_S + 1
    assert bench.find(token(exp=bench.now_s + 9)) is not None


@pytest.mark.parametrize("answer", [b"", b"[]", b'{"keys": 3}', b'{"keys": [{"kty": "RSA"}]}'])
def test_damaged_key_sets_are_none(answer: bytes) -> None:
    bench = Bench()
    bench.issuer.answer = answer
    with pytest.raises(EngineUnavailable):
        bench.find(token())


def test_the_discovery_document_tells_where_keys_are() -> None:
    bench = Bench(key_set_url=None)
    assert bench.find(token()) is not None
    assert bench.issuer.asked == [f"{ISSUER}/.well-known/openid-configuration", f"{ISSUER}/keys"]


def test_keys_come_by_https_or_from_this_machine() -> None:
    check_url("https://login.example.com/keys", "it")
    check_url("http://127.0.0.1:8/keys", "it")
    for url in ("http://login.example.com", "file:///etc/passwd", "ftp://h/x", "keys"):
        with pytest.raises(ValueError, match="https"):
            check_url(url, "it")


def test_many_tokens_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MOST_KNOWN", 2)
    bench = Bench()
    for name in "abcd":
        assert bench.find(token(sub=name)) == Caller(name, Role.USER)
    assert len(bench.callers._known) == 2
