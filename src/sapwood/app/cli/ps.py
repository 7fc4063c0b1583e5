"""`sapwood ps`: the servers that run on this machine."""

from __future__ import annotations

import time

import click

from sapwood.app.cli.pull import in_units
from sapwood.app.cli.stored import ago, print_table


@click.command()
def ps() -> None:
    """List the sapwood servers that you run on this machine.

    MEMORY is that of all processes of a server. TOK/S is the rate of output tokens now, which a
    server tells with --enable-metrics; MODEL is shown if the server answers without a key.
    """
    from sapwood.app.serving.running import running_servers

    servers = running_servers()
    if not servers:
        click.echo("no servers; start one with: sapwood serve", err=True)
        return
    rows = [("PID", "URL", "MODEL", "MEMORY", "TOK/S", "STARTED")]
    for server in servers:
        rows.append(
            (
                str(server.pid),
                server.url or "not listening yet",
                server.model or "-",
                in_units(server.memory_bytes),
                "-" if server.tokens_per_s is None else f"{server.tokens_per_s:.1f}",
                ago(time.time() - server.started_s),
            )
        )
    print_table(rows)
