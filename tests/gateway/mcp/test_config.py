"""The file that names MCP servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from sapwood.base.errors import ConfigError
from sapwood.gateway.mcp.config import Sse, Stdio, Streamable, load_servers


def test_a_file_names_servers_of_three_kinds(tmp_path: Path) -> None:
    path = tmp_path / "mcp.yaml"
    path.write_text(
        "servers:\n"
        "  - {name: files, protocol: stdio, command: run, args: [-v], envs: {A: b}}\n"
        "  - {name: old, protocol: sse, url: 'http://a/sse', token: t}\n"
        "  - {name: new, protocol: streamable, url: 'http://a/mcp', headers: {x: y}}\n",
        "utf-8",
    )
    files, old, new = load_servers(str(path))
    assert files == Stdio(name="files", command="run", args=["-v"], envs={"A": "b"})
    assert isinstance(old, Sse)
    assert old.sent_headers == {"authorization": "Bearer t"}
    assert isinstance(new, Streamable)
    assert new.sent_headers == {"x": "y"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[", "mcp.yaml"),
        ("servers: {}", "array"),
        ("servers: [{name: a, protocol: other, url: x}]", "other"),
        ("servers: [{name: a, protocol: sse, url: 'http://x', tokens: s3cret}]", "tokens"),
        ("servers: [{name: a, protocol: sse, url: 'ftp://x'}]", "must begin with http"),
        ("servers: [{name: 'a b', protocol: stdio, command: x}]", "must consist of"),
        (
            "servers: [{name: a, protocol: stdio, command: x}, {name: a, protocol: stdio, "
            "command: x}]",
            "two servers named 'a'",
        ),
    ],
)
def test_a_file_that_cannot_be_meant(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "mcp.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=told) as raised:
        load_servers(str(path))
    assert "s3cret" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_servers(str(tmp_path / "none.yaml"))
