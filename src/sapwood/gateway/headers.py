"""Headers on their way through the gateway: what belongs to one connection stays there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sapwood.http.raw_headers import RawHeaders, find

REQUEST_ID = b"x-request-id"
MAX_ID_BYTES = 200

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""RFC 9110, section 7.6.1."""

_NOT_FORWARDED = HOP_BY_HOP | {
    b"host",
    b"content-length",  # set anew
    b"expect",  # answered already
    b"forwarded",
    b"x-forwarded-for",
    b"x-forwarded-host",
    b"x-forwarded-proto",
    REQUEST_ID,
    # The gateway has checked where a page comes from; a worker knows nothing of its origins.
    b"origin",
    b"referer",
    b"sec-fetch-site",
    b"sec-fetch-mode",
    b"sec-fetch-dest",
    b"sec-fetch-user",
    b"cookie",
}
KEYS = frozenset({b"authorization", b"x-api-key"})
_TRACED = frozenset({b"traceparent", b"tracestate"})
_NOT_RETURNED = HOP_BY_HOP | {b"date", b"server", REQUEST_ID}


def request_head(
    method: str,
    target: bytes,
    *,
    host: bytes,
    headers: RawHeaders,
    extra: RawHeaders,
    num_body_bytes: int,
    own_key: str | None,
    pass_key: bool,
) -> bytes:
    """The head of the request to a worker.

    target   path and query
    headers  the client's, names in lower case
    extra    further ones
    own_key  the worker's key, which replaces the client's
    pass_key whether the client's key goes to a worker that has none of its own
    """
    dropped = _dropped(headers, _NOT_FORWARDED)
    if own_key is not None or not pass_key:
        dropped |= KEYS
    parts = [method.encode("ascii"), b" ", target, b" HTTP/1.1\r\nhost: ", host, b"\r\n"]
    for name, value in headers:
        if name not in dropped:
            parts += (name, b": ", value, b"\r\n")
    for name, value in extra:
        parts += (name, b": ", value, b"\r\n")
    if own_key is not None:
        parts += (b"authorization: Bearer ", own_key.encode("latin-1", "replace"), b"\r\n")
    if num_body_bytes or method in ("POST", "PUT"):
        parts.append(b"content-length: %d\r\n" % num_body_bytes)
    parts.append(b"\r\n")
    return b"".join(parts)


def metadata(
    headers: RawHeaders, *, extra: RawHeaders, own_key: str | None, pass_key: bool
) -> list[tuple[str, str]]:
    """What goes with a request to a worker that does not speak HTTP: the client's key, or the
    worker's, and the places in traces.

    extra  further ones, which replace the client's of these names
    """
    sent = dict(extra)
    for name, value in headers:
        is_key = name in KEYS and pass_key and own_key is None
        if is_key or name in _TRACED:
            sent.setdefault(name, value)
    if own_key is not None:
        sent[b"authorization"] = b"Bearer " + own_key.encode("latin-1", "replace")
    # Elsewhere than in HTTP only ASCII is possible, without blanks around it.
    told = ((name.decode("latin-1"), value.strip()) for name, value in sent.items())
    return [
        (name, value.decode("ascii"))
        for name, value in told
        if all(32 <= byte < 127 for byte in value)
    ]


def returned(headers: RawHeaders, request_id: bytes) -> list[tuple[bytes, bytes]]:
    """A worker's headers as the client gets them. Who may read an answer, the gateway says."""
    dropped = _dropped(headers, _NOT_RETURNED)
    kept = [
        (name, value)
        for name, value in headers
        if name not in dropped and not name.startswith(b"access-control-")
    ]
    kept.append((REQUEST_ID, request_id))
    return kept


def is_event_stream(headers: RawHeaders) -> bool:
    return find(headers, b"content-type", b"").startswith(b"text/event-stream")


def request_id(headers: RawHeaders, names: Sequence[bytes], otherwise: bytes) -> bytes:
    """The client's own name of its request, if there is a usable one; else `otherwise`."""
    for name in names:
        value = find(headers, name)
        if value and len(value) <= MAX_ID_BYTES and all(33 <= byte <= 126 for byte in value):
            return value
    return otherwise


def _dropped(headers: RawHeaders, always: frozenset[bytes]) -> frozenset[bytes]:
    """These names, and those that the Connection header lists."""
    listed = [value for name, value in headers if name == b"connection"]
    if not listed or listed in ([b"keep-alive"], [b"close"]):
        return always
    return always | frozenset(_names(listed))


def _names(values: Iterable[bytes]) -> Iterable[bytes]:
    return (part.strip().lower() for value in values for part in value.split(b","))
