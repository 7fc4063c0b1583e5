"""The `sapwood` command: finds the sub-command by name and imports only that one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

from sapwood.base.errors import SapwoodError

PLUGIN_GROUP = "sapwood.commands"
"""Entry points of this group are further sub-commands: click commands or groups."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """A sub-command that has not been imported; `target` is "module:name"."""

    target: str
    summary: str
    is_hidden: bool = False


COMMANDS: Mapping[str, LazyCommand] = {
    "serve": LazyCommand("sapwood.app.cli.serve:serve", "Serve a model over HTTP."),
    "gateway": LazyCommand(
        "sapwood.app.cli.gateway:gateway", "Route requests over engines: one address for many."
    ),
    "run": LazyCommand(
        "sapwood.app.cli.run:run", "Chat with a model: fetch it, serve it, and talk."
    ),
    "chat": LazyCommand("sapwood.app.cli.chat:chat", "Talk with a model in the terminal."),
    "generate": LazyCommand(
        "sapwood.app.cli.generate:generate", "Answer a file of prompts, without a server."
    ),
    "paint": LazyCommand(
        "sapwood.app.cli.paint:paint", "Draw a picture with a diffusion model, without a server."
    ),
    "pull": LazyCommand("sapwood.app.cli.pull:pull", "Get a model's files before they are needed."),
    "list": LazyCommand("sapwood.app.cli.stored:list_models", "List the models on this disk."),
    "rm": LazyCommand("sapwood.app.cli.stored:remove", "Remove models from this disk."),
    "cache": LazyCommand(
        "sapwood.app.cli.cache:cache", "Show and clear the pages of KV in a storage directory."
    ),
    "models": LazyCommand(
        "sapwood.app.cli.models:models", "List the architectures that are served."
    ),
    "ps": LazyCommand("sapwood.app.cli.ps:ps", "List the servers that run on this machine."),
    "verify": LazyCommand(
        "sapwood.app.cli.verify:verify", "Make and check lists of checksums of a model's files."
    ),
    "convert": LazyCommand(
        "sapwood.app.cli.convert:convert", "Write a model with its weights in fewer bits."
    ),
    "check": LazyCommand(
        "sapwood.app.cli.check:check", "Show what this machine has, and what would run on it."
    ),
    "kernels": LazyCommand(
        "sapwood.app.cli.kernels:kernels", "List and test the implementations of the ops."
    ),
    "completion": LazyCommand(
        "sapwood.app.cli.completion:completion", "Print a script that completes in a shell."
    ),
    "reference": LazyCommand(
        "sapwood.app.cli.reference:reference",
        "Write the generated parts of the documentation.",
        is_hidden=True,
    ),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are invoked, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        own = [name for name, command in COMMANDS.items() if not command.is_hidden]
        return [*own, *sorted(name for name in _plugins() if name not in COMMANDS)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            module, _, attribute = COMMANDS[cmd_name].target.partition(":")
            return _as_command(cmd_name, getattr(import_module(module), attribute))
        plugins = _plugins()
        if cmd_name not in plugins:
            return None
        return _as_command(cmd_name, plugins[cmd_name].load())

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        known = self.list_commands(ctx)
        if name not in known and name not in COMMANDS and not name.startswith("-"):
            from sapwood.app.cli.suggestions import command_hint

            ctx.fail(f"sapwood has no command {name}{command_hint(name, known)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, self._summary(name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def _summary(self, name: str) -> str:
        if name in COMMANDS:
            return COMMANDS[name].summary
        return f"See `sapwood {name} --help`."


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=PLUGIN_GROUP)}


def _as_command(name: str, found: Any) -> click.Command:
    if not isinstance(found, click.Command):
        raise TypeError(f"the sub-command {name!r} is {found!r}, which is no click command")
    return found


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sapwood", message="sapwood %(version)s")
def cli() -> None:
    """sapwood serves language and diffusion models, fast on CPUs and GPUs."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    0 done; 1 a failure that is explained on stderr; 2 wrong usage; 130 Ctrl-C. Only bugs show a
    stack.
    """
    try:
        result = cli.main(args=args, prog_name="sapwood", standalone_mode=False)
    except click.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except SapwoodError as error:
        click.echo(f"sapwood: {error.message}", err=True)
        return 1
    return result if isinstance(result, int) else 0
