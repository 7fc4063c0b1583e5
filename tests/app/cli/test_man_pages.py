from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from sapwood.app.cli.command_table import CommandEntry, Flag, command_table
from sapwood.app.cli.main import main
from sapwood.app.cli.man_pages import man_pages, page

needs_groff = pytest.mark.skipif(shutil.which("groff") is None, reason="groff is missing")


def printed(text: str) -> str:
    """The page as groff prints it on a terminal; a warning of groff is a failure."""
    # A word that is longer than a line is no fault of the page.
    command = ["groff", "-man", "-Tutf8", "-P-c", "-P-b", "-P-u", "-ww", "-W", "break"]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=True, timeout=30
    )
    assert not done.stderr, done.stderr
    return done.stdout


@needs_groff
def test_groff_prints_the_largest_pages_with_every_flag():
    pages = man_pages()
    entries = {entry.path: entry for entry in command_table()}
    for path in ((), ("serve",), ("gateway",), ("bench", "ops")):
        text = printed(pages["-".join(("sapwood", *path)) + ".1"])
        for flag in entries[path].flags:
            for name in flag.names:
                assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text), (path, name)
        for child in entries[path].children:
            assert re.search(rf"^ +{child}\b", text, re.MULTILINE), child


@needs_groff
def test_odd_texts_are_printed_as_they_are():
    odd = ".so /etc/passwd \\fB'x' \u201c\u03b1\u201d --a-b"
    flag = Flag(names=("--odd",), value="X", choices=(), help=odd, notes="", section="Options")
    entry = CommandEntry(path=("odd",), usage="sapwood odd", help=odd, flags=(flag,), children=())
    text = printed(page(entry, [entry]))
    assert " ".join(text.split()).count(odd) == 3  # as summary, text and help


def test_every_command_has_a_page_and_every_macro_is_known(tmp_path, capsys):
    assert main(["reference", "--man", str(tmp_path)]) == 0
    names = {"-".join(("sapwood", *entry.path)) + ".1" for entry in command_table()}
    assert {path.name for path in tmp_path.iterdir()} == names == set(man_pages())
    for path in tmp_path.iterdir():
        text = path.read_text("ascii")
        macros = {line.split(" ")[0] for line in text.splitlines() if line.startswith(".")}
        assert macros <= {".TH", ".SH", ".TP", ".PP", ".nh", ".ad"}
    assert main(["reference", "--man", "--check", str(tmp_path)]) == 2
    assert "leave --check out" in capsys.readouterr().err
