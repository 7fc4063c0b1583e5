"""Callers who bring a JSON Web Token of an identity provider, as OpenID Connect issues them.

Sources: RFC 7519 (tokens), RFC 7517 (key sets), OpenID Connect Discovery 1.0 (where keys are).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from joserfc import jwt
from joserfc.errors import ExpiredTokenError, InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet

from sapwood.base.errors import EngineUnavailable
from sapwood.http.callers import Caller, Role, digest_of
from sapwood.http.errors import NotAllowed, NotAuthenticated

log = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA")
"""Signatures with a private key only: a public key must never pass for a shared secret."""
ROLE_CLAIMS = ("roles", "role", "groups")
MAX_TOKEN_BYTES = 16 << 10
MAX_KEY_SET_BYTES = 1 << 20
FETCH_TIMEOUT_S = 10.0
LEEWAY_S = 60
"""By which the clocks of issuer and gateway may differ."""
KEYS_LAST_S = 3600.0
"""Keys are fetched anew after so long, so that withdrawn ones end."""
LEAST_BETWEEN_FETCHES_S = 10.0
"""Tokens that name unknown keys cannot make the gateway fetch more often."""
MOST_KNOWN = 10_000
"""Tokens that are remembered as good, so that their signatures are computed once."""

Fetch = Callable[[str], Awaitable[bytes]]


class TokenCallers:
    """Verifies tokens with the issuer's public keys, which are fetched when first needed."""

    def __init__(
        self,
        *,
        issuer: str,
        audience: str | None,
        key_set_url: str | None,
        roles: Mapping[str, Role],
        fetch: Fetch | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """A verifier without keys.

        audience     that tokens must name; None: any
        key_set_url  where the keys are; None: where the issuer's discovery document says
        roles        what a name in a token's roles means here
        fetch        gets the bytes at an address; for tests
        clock        seconds since the epoch
        """
        self._issuer = issuer
        self._key_set_url = key_set_url
        self._roles = roles
        self._fetch = fetch or fetched
        self._clock = clock
        self._keys: KeySet | None = None
        self._fetched_s = 0.0
        self._tried_s = -LEAST_BETWEEN_FETCHES_S
        self._fetching = asyncio.Lock()
        self._known: OrderedDict[bytes, tuple[float, Caller]] = OrderedDict()
        claims: dict[str, Any] = {
            "iss": {"essential": True, "value": issuer},
            "exp": {"essential": True},
        }
        if audience is not None:
            claims["aud"] = {"essential": True, "value": audience}
        self._claims = jwt.JWTClaimsRegistry(now=lambda: int(clock()), leeway=LEEWAY_S, **claims)

    async def find(self, credential: str) -> Caller | None:
        """As Callers.find. A token that cannot be used is refused with the reason: 401, 403 where
        it names no role, 503 where the issuer's keys cannot be had."""
        if credential.count(".") != 2:
            return None
        if len(credential) > MAX_TOKEN_BYTES:
            raise NotAuthenticated(f"the token has more than {MAX_TOKEN_BYTES} bytes")
        digest = digest_of(credential)
        known = self._known.get(digest)
        if known is not None and known[0] > self._clock() and not self._are_old():
            self._known.move_to_end(digest)
            return known[1]
        claims = await self._verified(credential)
        caller = Caller(_name(claims), self._role(claims))
        self._known[digest] = (float(claims["exp"]) + LEEWAY_S, caller)
        if len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        return caller

    async def _verified(self, credential: str) -> dict[str, Any]:
        keys = await self._key_set()
        try:
            try:
                token = jwt.decode(credential, keys, algorithms=list(ALGORITHMS))
            except InvalidKeyIdError:
                # The issuer may have a new key.
                token = jwt.decode(
                    credential, await self._key_set(anew=True), algorithms=list(ALGORITHMS)
                )
            self._claims.validate(token.claims)
        except ExpiredTokenError:
            raise NotAuthenticated("the token has expired; get a new one") from None
        except (JoseError, ValueError, TypeError, KeyError) as error:
            raise NotAuthenticated(
                f"the token cannot be used: {error}; it must be signed by {self._issuer} for this "
                "gateway"
            ) from None
        return token.claims

    def _role(self, claims: Mapping[str, Any]) -> Role:
        told: list[str] = []
        for name in ROLE_CLAIMS:
            value = claims.get(name, [])
            told += [value] if isinstance(value, str) else [str(each) for each in value or []]
        roles = {self._roles[name] for name in told if name in self._roles}
        if not roles:
            raise NotAllowed(
                f"the token's roles ({', '.join(told)[:200] or 'none'}) are none that this gateway "
                f"knows ({', '.join(self._roles)}); see --jwt-role-mapping"
            )
        return Role.ADMIN if Role.ADMIN in roles else Role.USER

    def _are_old(self) -> bool:
        return self._clock() - self._fetched_s > KEYS_LAST_S

    async def _key_set(self, *, anew: bool = False) -> KeySet:
        """The issuer's keys. Old ones serve on while new ones cannot be fetched."""
        before = self._keys
        if before is not None and not anew and not self._are_old():
            return before
        async with self._fetching:
            is_early = self._clock() - self._tried_s < LEAST_BETWEEN_FETCHES_S
            if self._keys is before and not is_early:
                self._tried_s = self._clock()
                try:
                    self._keys = await self._fetched_keys()
                    self._fetched_s = self._clock()
                    self._known.clear()
                except (OSError, ValueError, KeyError, TypeError, JoseError) as error:
                    log.warning("the keys of %s could not be fetched: %s", self._issuer, error)
        if self._keys is None:
            raise EngineUnavailable(
                f"the keys of {self._issuer} cannot be fetched, so no token can be checked; try "
                "again later"
            )
        return self._keys

    async def _fetched_keys(self) -> KeySet:
        if self._key_set_url is None:
            place = f"{self._issuer.rstrip('/')}/.well-known/openid-configuration"
            document = json.loads(await self._fetch(place))
            if document["issuer"] != self._issuer:
                raise ValueError(f"{place} is of another issuer, {str(document['issuer'])[:200]}")
            url = str(document["jwks_uri"])
            check_url(url, "the issuer's jwks_uri")
            self._key_set_url = url
        told = json.loads(await self._fetch(self._key_set_url))
        return KeySet.import_key_set({"keys": told["keys"]})


def _name(claims: Mapping[str, Any]) -> str:
    return str(claims.get("sub") or claims.get("client_id") or "a token without a subject")[:200]


def check_url(url: str, name: str) -> None:
    """ValueError unless the address is HTTPS, or on this machine."""
    parts = urllib.parse.urlsplit(url)
    is_local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_local):
        raise ValueError(f"{name} is {url!r} but must begin with https://")


async def fetched(url: str) -> bytes:
    """The bytes at an address, at most MAX_KEY_SET_BYTES of them; OSError, ValueError."""
    return await asyncio.to_thread(_fetched, url)


def _fetched(url: str) -> bytes:
    check_url(url, "the address")
    with urllib.request.urlopen(url, timeout=FETCH_TIMEOUT_S) as answer:
        found: bytes = answer.read(MAX_KEY_SET_BYTES + 1)
    if len(found) > MAX_KEY_SET_BYTES:
        raise ValueError(f"{url} has more than {MAX_KEY_SET_BYTES} bytes")
    return found
