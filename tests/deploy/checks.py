"""What manifests of every kind are held against: our commands, options and paths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import click

from sapwood.app.cli.main import cli
from sapwood.frontends.native.routes import ROWS
from sapwood.gateway.steering import steering_dialect
from sapwood.http.endpoints import Dialect
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.gateway import GatewayConfig
from sapwood.schema.config.observability import ObservabilityConfig
from sapwood.schema.config.options import build
from sapwood.schema.config.server import ServerConfig


def built(arguments: Sequence[str]) -> dict[str, Any]:
    """The options that `sapwood <arguments>` is given, after their configs were built with them.

    Raises click.UsageError for what is no option, ConfigError for what contradicts."""
    name, *rest = arguments
    top = click.Context(cli, info_name="sapwood", **cli.context_settings)
    command = cli.get_command(top, name)
    assert command is not None, f"sapwood has no command {name}"
    params = command.make_context(name, list(rest), parent=top).params
    given = {key: value for key, value in params.items() if value is not None}
    if name == "gateway":
        build(GatewayConfig, given)
    else:
        EngineConfig.of(given)
        build(ServerConfig, given)
        build(ObservabilityConfig, given)
    return given


@cache
def engine_paths() -> frozenset[str]:
    """Paths of an engine that need no key."""
    return _open_paths(ROWS.dialect("native", cast(Any, None)))


@cache
def gateway_paths() -> frozenset[str]:
    return _open_paths(steering_dialect(cast(Any, None)))


def _open_paths(dialect: Dialect) -> frozenset[str]:
    rows = [endpoint for endpoint, _ in dialect.rows]
    return frozenset(
        path
        for endpoint in rows
        if endpoint.access == "open" and "GET" in endpoint.methods
        for path in endpoint.paths
    )
