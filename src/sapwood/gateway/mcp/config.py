"""The MCP servers that the gateway's operator names in a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sapwood.base.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Stdio(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="protocol",
    tag="stdio",
):
    """A program that the gateway starts; envs: added to a small environment without secrets."""

    name: str
    command: str
    args: list[str] = []
    envs: dict[str, str] = {}


class _Remote(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="protocol"
):
    """token: sent as `authorization: Bearer`; headers: sent with each request"""

    name: str
    url: str
    token: str | None = None
    headers: dict[str, str] = {}

    @property
    def sent_headers(self) -> dict[str, str]:
        if self.token is None:
            return self.headers
        return {**self.headers, "authorization": f"Bearer {self.token}"}


class Sse(_Remote, frozen=True, tag="sse"):
    """A server with the older transport: events by GET, messages by POST."""


class Streamable(_Remote, frozen=True, tag="streamable"):
    """A server with streamable HTTP, the newer transport."""


Server = Stdio | Sse | Streamable


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    servers: list[Server]


def load_servers(path: str) -> Sequence[Server]:
    """The servers of a file in YAML or JSON.

    Raises ConfigError if the file cannot be read, or does not say what servers there are.
    """
    try:
        raw = Path(path).expanduser().read_bytes()
        servers = msgspec.yaml.decode(raw, type=_File).servers
    except (OSError, ValueError) as error:
        # A message of msgspec names the field, never its value, which may be secret.
        raise ConfigError(f"--mcp-config-path {path}: {error}") from None
    names = [server.name for server in servers]
    for server in servers:
        if not _NAME.fullmatch(server.name):
            raise ConfigError(
                f"--mcp-config-path {path}: the server name {server.name!r} must consist of 1 to "
                "64 letters, digits, - and _"
            )
        if names.count(server.name) > 1:
            raise ConfigError(f"--mcp-config-path {path} has two servers named {server.name!r}")
        if not isinstance(server, Stdio) and not server.url.startswith(("http://", "https://")):
            raise ConfigError(
                f"--mcp-config-path {path}: the url of {server.name!r} must begin with http:// or "
                "https://"
            )
    return servers
