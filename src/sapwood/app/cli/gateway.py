"""`sapwood gateway`."""

from __future__ import annotations

from dataclasses import replace

import click

from sapwood.app.cli.options import Asked, ConfigCommand, config_options
from sapwood.schema.config.gateway import GatewayConfig


@click.command(cls=ConfigCommand)
@click.argument("urls", nargs=-1)
@config_options(GatewayConfig)
@click.pass_context
def gateway(ctx: click.Context, urls: tuple[str, ...], asked: Asked) -> None:
    """Route requests over engines: one address for many.

    URLS are added to those of --worker-urls.
    SIGTERM and Ctrl-C stop it after the open requests have ended.
    """
    config = asked.build(GatewayConfig)
    config = replace(config, worker_urls=",".join([*config.urls, *urls]))
    from sapwood.app.gateway.assembly import route

    ctx.exit(route(config))
