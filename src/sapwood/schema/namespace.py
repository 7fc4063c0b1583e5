"""The name of the requests that share cached prefixes: a digest of what a client sends.

Prefix trees, indexes of guesses, KV events and load balancers know prefixes by this name, and keep
it as long as the prefixes. So its size is fixed, whatever the client has sent.
"""

from __future__ import annotations

import hashlib

from sapwood.schema.limits import CACHE_KEY

DIGEST_CHARACTERS = 32


def cache_namespace(extra_key: str, cache_salt: str = "") -> str:
    """The same for two requests if both texts agree, whichever dialect brings them; "" if both
    are empty.

    Raises InvalidRequest, naming the field, for a text that is too long."""
    CACHE_KEY.check(len(extra_key), "extra_key")
    CACHE_KEY.check(len(cache_salt), "cache_salt")
    if not extra_key and not cache_salt:
        return ""
    # The length says where the salt ends, so that no key can imitate a salt.
    spelled = f"{len(cache_salt)}:{cache_salt}{extra_key}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(spelled, digest_size=DIGEST_CHARACTERS // 2).hexdigest()
