"""All commands and their flags as plain values: what shell completion and man pages are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import click

from sapwood.app.cli.options import ConfigOption, component_title, metavar_of, notes_of
from sapwood.schema.config.engine import COMPONENTS

ENGINE_TITLES = frozenset(component_title(config) for config in COMPONENTS)
"""Headings of the options that every command with an engine takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One option of a command."""

    names: tuple[str, ...]
    """All spellings, with their dashes: those of a switch's off form too."""
    value: str
    """How the value reads in a help text, such as "N"; empty for a switch."""
    choices: tuple[str, ...]
    help: str
    notes: str
    """Unit, default and environment variable; empty for options that no config has."""
    section: str
    """The heading that it stands under in the command's help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandEntry:
    """One command; `path` is ("bench", "ops") for `sapwood bench ops`, and empty for `sapwood`."""

    path: tuple[str, ...]
    usage: str
    help: str
    flags: tuple[Flag, ...]
    children: tuple[str, ...]
    """Names of its sub-commands."""

    @property
    def summary(self) -> str:
        return first_sentence(self.help)


def first_sentence(text: str) -> str:
    """The first sentence of a help text in one line, without its full stop."""
    line = " ".join(text.split("\n\n")[0].split())
    return line.partition(". ")[0].removesuffix(".")


def command_table() -> list[CommandEntry]:
    """Every command that the help lists, `sapwood` itself first."""
    from sapwood.app.cli.main import cli

    return list(_entries(cli, click.Context(cli, info_name="sapwood", **cli.context_settings), ()))


def _entries(
    command: click.Command, context: click.Context, path: tuple[str, ...]
) -> Iterator[CommandEntry]:
    children = command.list_commands(context) if isinstance(command, click.Group) else []
    params = command.get_params(context)
    options = [one for one in params if isinstance(one, click.Option) and not one.hidden]
    yield CommandEntry(
        path=path,
        usage=" ".join([context.command_path, *command.collect_usage_pieces(context)]),
        help=(command.help or "").replace("\b\n", ""),
        flags=tuple(_flag(option) for option in options),
        children=tuple(children),
    )
    for name in children:
        assert isinstance(command, click.Group)
        child = command.get_command(context, name)
        assert child is not None, f"{name} is listed, so it can be had"
        inner = click.Context(child, info_name=name, parent=context, **child.context_settings)
        yield from _entries(child, inner, (*path, name))


def _flag(option: click.Option) -> Flag:
    names = (*option.opts, *option.secondary_opts)
    if isinstance(option, ConfigOption):
        spec = option.spec
        return Flag(
            names=names,
            value="" if option.is_flag else metavar_of(spec),
            choices=() if option.is_flag else tuple(spec.choices or ()),
            help=spec.help,
            notes=notes_of(spec),
            section=option.component,
        )
    kind = option.type
    return Flag(
        names=names,
        value="" if option.is_flag else (option.metavar or kind.name.upper()),
        choices=tuple(map(str, kind.choices)) if isinstance(kind, click.Choice) else (),
        help=" ".join((option.help or "").split()),
        notes="",
        section="Options",
    )
