"""`sapwood run`: chat with a model that need not be fetched or served before."""

from __future__ import annotations

from dataclasses import replace

import click

from sapwood.app.cli.chat import ChatOptions, converse, image_option
from sapwood.app.cli.options import Asked, ConfigCommand, config_options
from sapwood.schema.config.engine import COMPONENTS
from sapwood.schema.config.server import ServerConfig


@click.command(cls=ConfigCommand)
@click.argument("name", required=False)
@click.argument("message", required=False)
@image_option
@config_options(ChatOptions, *COMPONENTS)
def run(name: str | None, message: str | None, pictures: tuple[str, ...], asked: Asked) -> None:
    """Chat with the model NAME in the terminal; with MESSAGE, only answer that.

    NAME is a catalogue name, a hub repository (owner/name) or a path; without it, the configured
    model.

    If a server on the default port has this model, that server answers. Else the model is fetched,
    unless it is on this disk, and runs in this process. Ctrl-C stops an answer, Ctrl-D leaves,
    /help lists the commands, /clear forgets what was said.
    """
    options = asked.build(ChatOptions)
    engine_flags = asked.from_command_line(COMPONENTS)
    asked = asked.with_model(name)
    if options.url is None and not engine_flags:  # such flags ask for an engine of one's own
        url = server_with(asked.engine().model.model, api_key=options.api_key)
        if url is None:
            options = replace(options, api_key=None)
        else:
            click.echo(f"using the server at {url}", err=True)
            options = replace(options, url=url)
    converse(options, asked, () if message is None else (message,), pictures)


def server_with(name: str, *, api_key: str | None) -> str | None:
    """The address of the server on the default port, if it serves that model."""
    from sapwood.app.serving.running import served_model
    from sapwood.store.default_model import DEFAULT, PREFERRED, SMALL

    config = ServerConfig()
    url = f"http://{config.host}:{config.port}"
    wanted = (PREFERRED, SMALL) if name == DEFAULT else (name,)
    return url if served_model(url, api_key=api_key) in wanted else None
