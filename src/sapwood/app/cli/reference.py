"""The generated parts of the documentation: every option, field, limit, architecture, and
command's help."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from sapwood.app.cli.llama_cpp_flags import LLAMA_CPP_ROWS
from sapwood.app.cli.options import SHARED_CONFIGS, component_title, default_of, names_of
from sapwood.app.cli.peer_flag import PeerFlag
from sapwood.app.cli.peer_flags import PEER_ROWS
from sapwood.app.cli.peer_flags import as_markdown as table_of_flags
from sapwood.app.cli.vllm_flags import VLLM_ROWS
from sapwood.schema import limits
from sapwood.schema.config.engine import COMPONENTS
from sapwood.schema.config.options import OptionSpec, option_specs

CONFIGURATION = "configuration.md"
COMMAND_LINE = "command-line.md"
FIELDS = "fields.md"
LIMITS = "limits.md"
MODELS = "models.md"
PEER_PAGES: Mapping[str, tuple[str, Mapping[str, PeerFlag]]] = {
    "coming-from-sglang.md": ("SGLang", PEER_ROWS),
    "coming-from-vllm.md": ("vLLM", VLLM_ROWS),
    "coming-from-llama-cpp-and-ollama.md": ("llama-server", LLAMA_CPP_ROWS),
}
HELP_WIDTH = 100

_HELP = re.compile(
    r"(<!-- help: sapwood(?P<name>[\w -]*) -->\n).*?(<!-- end of help -->)", re.DOTALL
)
_FIELDS = re.compile(r"(<!-- fields -->\n).*?(<!-- end of fields -->)", re.DOTALL)
_LIMITS = re.compile(r"(<!-- limits -->\n).*?(<!-- end of limits -->)", re.DOTALL)
_MODELS = re.compile(r"(<!-- models -->\n).*?(<!-- end of models -->)", re.DOTALL)
_PEER = re.compile(r"(<!-- flags -->\n).*?(<!-- end of flags -->)", re.DOTALL)
_OPTIONS = re.compile(r"(<!-- options -->\n).*?(<!-- end of options -->)", re.DOTALL)


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--check", "only_check", is_flag=True, help="Change nothing; fail if a page is stale."
)
@click.option(
    "--man", "is_man", is_flag=True, help="Write the man pages of all commands there instead."
)
@click.pass_context
def reference(ctx: click.Context, directory: Path, only_check: bool, is_man: bool) -> None:
    """Write the generated parts of the pages in DIRECTORY anew."""
    if is_man and only_check:
        raise click.UsageError("--man writes pages that no folder keeps; leave --check out")
    if is_man:
        from sapwood.app.cli.man_pages import man_pages

        for name, text in man_pages().items():
            (directory / name).write_text(text, encoding="utf-8")
            click.echo(f"{name} written")
        return
    stale = stale_pages(directory)
    for name, text in stale.items():
        click.echo(f"{name} {'is stale' if only_check else 'written'}")
        if not only_check:
            (directory / name).write_text(text, encoding="utf-8")
    if only_check and stale:
        ctx.exit(1)


def stale_pages(directory: Path) -> dict[str, str]:
    """Page -> its right contents, for each page that does not match the code."""
    pages = {
        CONFIGURATION: with_options((directory / CONFIGURATION).read_text(encoding="utf-8")),
        COMMAND_LINE: with_help((directory / COMMAND_LINE).read_text(encoding="utf-8")),
        FIELDS: with_fields((directory / FIELDS).read_text(encoding="utf-8")),
        LIMITS: with_limits((directory / LIMITS).read_text(encoding="utf-8")),
        MODELS: with_models((directory / MODELS).read_text(encoding="utf-8")),
        **{
            page: with_peer_flags((directory / page).read_text(encoding="utf-8"), peer, rows)
            for page, (peer, rows) in PEER_PAGES.items()
        },
    }
    return {
        name: text
        for name, text in pages.items()
        if text != (directory / name).read_text(encoding="utf-8")
    }


def with_options(page: str) -> str:
    """The page with a table of options per component between its markers."""
    tables = "\n".join(option_table(config) for config in SHARED_CONFIGS)
    return _OPTIONS.sub(lambda found: f"{found[1]}\n{tables}\n{found[2]}", page)


def with_fields(page: str) -> str:
    """The page with a table per JSON object between its markers."""
    # The frontends are no light import, and only this page needs them.
    from sapwood.frontends.field_tables import as_markdown

    return _FIELDS.sub(lambda found: f"{found[1]}\n{as_markdown()}\n{found[2]}", page)


def with_limits(page: str) -> str:
    """The page with a table of a request's limits between its markers."""
    return _LIMITS.sub(lambda found: f"{found[1]}\n{limits.as_markdown()}\n\n{found[2]}", page)


def with_models(page: str) -> str:
    """The page with a table of architectures between its markers."""
    from sapwood.app.cli.models import as_markdown, rows

    return _MODELS.sub(lambda found: f"{found[1]}\n{as_markdown(rows())}\n\n{found[2]}", page)


def with_peer_flags(page: str, peer: str, rows: Mapping[str, PeerFlag]) -> str:
    """The page with a table of a peer's other flags between its markers."""
    table = table_of_flags(peer, rows)
    return _PEER.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", page)


def with_help(page: str) -> str:
    """The page with each command's --help between its markers."""

    def fill(found: re.Match[str]) -> str:
        text = help_text(found["name"].split())
        return f"{found[1]}```text\n{text}```\n{found[3]}"

    return _HELP.sub(fill, page)


def option_table(config: type) -> str:
    lines = [
        f"### {component_title(config)}",
        "",
        "| Flag | Environment | Values | Default | Meaning |",
        "|---|---|---|---|---|",
    ]
    lines += [_row(spec) for spec in option_specs(config)]
    return "\n".join([*lines, ""])


def help_text(path: Sequence[str]) -> str:
    """The output of `sapwood <path> --help`, without the options that configuration.md lists."""
    from sapwood.app.cli.main import cli

    context = click.Context(
        cli, info_name="sapwood", terminal_width=HELP_WIDTH, **cli.context_settings
    )
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"a page asks for the help of {name}, which is no command")
        command = found
        context = click.Context(command, info_name=name, parent=context, terminal_width=HELP_WIDTH)
    shared = tuple(f"{component_title(config)}:\n" for config in COMPONENTS)
    sections = command.get_help(context).split("\n\n")
    return "\n\n".join(part for part in sections if not part.startswith(shared)) + "\n"


def _row(spec: OptionSpec) -> str:
    flags = ", ".join(f"`--{name}`" for name in names_of(spec))
    cells = [flags, f"`{spec.env}`", _values(spec), f"`{default_of(spec)}`", spec.help]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _values(spec: OptionSpec) -> str:
    if spec.choices:
        return ", ".join(f"`{choice}`" for choice in spec.choices)
    kind = {bool: "on or off", int: "whole number", float: "number", str: "text"}[spec.type]
    return f"{kind} ({spec.unit})" if spec.unit else kind
