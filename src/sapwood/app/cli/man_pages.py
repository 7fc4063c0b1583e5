"""Man pages of all commands, made of the command table (roff's man macros)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from sapwood.app.cli.command_table import ENGINE_TITLES, CommandEntry, Flag, command_table


def man_pages() -> dict[str, str]:
    """File -> contents, for each command: "sapwood-serve.1" is `man sapwood-serve`."""
    table = command_table()
    return {f"{_title(entry.path)}.1": page(entry, table) for entry in table}


def page(entry: CommandEntry, table: Sequence[CommandEntry]) -> str:
    """One command's page."""
    title = _title(entry.path)
    lines = [
        f'.TH {_quoted(title.upper())} 1 "" {_quoted("sapwood " + version("sapwood"))}',
        # Neither hyphens nor wide gaps in names of flags.
        ".nh",
        ".ad l",
        ".SH NAME",
        f"{_text(title)} \\- {_text(entry.summary)}",
        ".SH SYNOPSIS",
        _text(entry.usage),
        ".SH DESCRIPTION",
        *_paragraphs(entry.help),
    ]
    children = [one for one in table if one.path[:-1] == entry.path and one.path]
    if children:
        lines.append(".SH COMMANDS")
        for child in children:
            lines += [".TP", f"\\fB{_text(child.path[-1])}\\fR", _text(child.summary)]
    # Options of one section need not stand together.
    ordered = sorted(entry.flags, key=lambda flag: flag.section != "Options")
    sections = dict.fromkeys(flag.section for flag in ordered)
    for section in sections:
        name = f"Engine: {section}" if section in ENGINE_TITLES else section
        lines.append(f".SH {_quoted(name.upper())}")
        for flag in ordered:
            if flag.section == section:
                lines += _flag(flag)
    related = [_title(one.path) for one in children] or ["sapwood"]
    lines += [".SH SEE ALSO", ", ".join(f"\\fB{_text(name)}\\fR(1)" for name in related)]
    return "\n".join(lines) + "\n"


def _title(path: Sequence[str]) -> str:
    return "-".join(("sapwood", *path))


def _flag(flag: Flag) -> list[str]:
    names = ", ".join(f"\\fB{_text(name)}\\fR" for name in flag.names)
    value = f" \\fI{_text(flag.value)}\\fR" if flag.value else ""
    notes = f" [{flag.notes}]" if flag.notes else ""
    return [".TP", names + value, _text(flag.help + notes)]


def _paragraphs(text: str) -> list[str]:
    lines: list[str] = []
    for part in text.split("\n\n"):
        words = " ".join(part.split())
        if words:
            lines += [".PP", _text(words)]
    return lines


def _text(text: str) -> str:
    """The text as roff prints it unchanged: a line that begins with a dot would be a macro, a bare
    dash a hyphen, which nobody can paste, and what is not ASCII may be read as Latin 1."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    escaped = "".join(char if char.isascii() else f"\\[u{ord(char):04X}]" for char in escaped)
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


def _quoted(text: str) -> str:
    escaped = _text(text).replace('"', "\\(dq")
    return f'"{escaped}"'
