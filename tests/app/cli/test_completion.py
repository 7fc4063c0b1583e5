"""Completion scripts are loaded by their shells, and complete there; a shell that is not installed
is skipped."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from sapwood.app.cli.command_table import Flag, command_table, first_sentence
from sapwood.app.cli.completion import SCRIPTS, fish_script
from sapwood.app.cli.main import COMMANDS, main

_BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_sapwood
if ((${#COMPREPLY[@]})); then printf '%s\\n' "${COMPREPLY[@]}"; fi
"""
_ZSH = """
compdef() { }
_describe() { local name=${@[-1]}; print -l -- "${(@)${(@P)name}%%:*}" }
_files() { print "a file" }
compadd() { shift; print -l -- "$@" }
compset() { }
source $1; shift
words=("$@"); CURRENT=$#words; _sapwood
"""
"""zsh's own completion functions, as far as the script calls them."""


def in_bash(script: Path, words: Sequence[str]) -> list[str]:
    return output_of("bash", "--norc", "-c", _BASH, "bash", str(script), *words)


def in_zsh(script: Path, words: Sequence[str]) -> list[str]:
    found = output_of("zsh", "-f", "-c", _ZSH, "zsh", str(script), *words)
    return [word for word in found if word.startswith(words[-1].rpartition("=")[2])]


def in_fish(script: Path, words: Sequence[str]) -> list[str]:
    line = " ".join(words)
    code = "source $argv[1]; complete -C $argv[2]"
    found = output_of("fish", "--no-config", "-c", code, str(script), line)
    return [word.partition("\t")[0].rpartition("=")[2] for word in found]


def output_of(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout.split("\n")[:-1]


COMPLETE: Mapping[str, Callable[[Path, Sequence[str]], list[str]]] = {
    "bash": in_bash,
    "zsh": in_zsh,
    "fish": in_fish,
}
every_shell = pytest.mark.parametrize(
    "shell",
    [
        pytest.param(
            name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is missing")
        )
        for name in SCRIPTS
    ],
)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    table = command_table()
    folder = tmp_path_factory.mktemp("scripts")
    for name, script in SCRIPTS.items():
        (folder / name).write_text(script(table), "utf-8")
    return {name: folder / name for name in SCRIPTS}


@every_shell
def test_a_shell_completes_commands_flags_and_values(shell, scripts):
    def complete(*words: str) -> list[str]:
        return COMPLETE[shell](scripts[shell], words)

    shown = {name for name, command in COMMANDS.items() if not command.is_hidden}
    assert set(complete("sapwood", "")) == {*shown, "bench"}
    assert complete("sapwood", "ser") == ["serve"]
    assert complete("sapwood", "bench", "rank") == ["ranks"]
    assert complete("sapwood", "serve", "--radix-ev") == ["--radix-eviction-policy"]
    assert "--no-offline" in complete("sapwood", "serve", "--no-of")
    assert complete("sapwood", "gateway", "--radix-ev") == []
    assert "--output-dir" in complete("sapwood", "bench", "ops", "--output")
    assert sorted(complete("sapwood", "serve", "--radix-eviction-policy", "l")) == ["lfu", "lru"]


@every_shell
def test_a_value_that_reads_like_a_command_is_no_command(shell, scripts):
    found = COMPLETE[shell](scripts[shell], ("sapwood", "serve", "--model", "chat", "--radix-ev"))
    assert found == ["--radix-eviction-policy"]


def test_bash_completes_a_value_behind_an_equals_sign(scripts):
    words = ("sapwood", "serve", "--radix-eviction-policy", "=")
    assert sorted(in_bash(scripts["bash"], words)) == ["lfu", "lru"]
    assert in_bash(scripts["bash"], (*words, "lr")) == ["lru"]


def test_every_flag_of_every_command_is_in_every_script(scripts):
    texts = {name: path.read_text("utf-8") for name, path in scripts.items()}
    num_flags = 0
    for entry in command_table():
        for name in (name for flag in entry.flags for name in flag.names):
            num_flags += 1
            assert name in texts["bash"], (entry.path, name)
            assert f"{name}:" in texts["zsh"], (entry.path, name)
            if name.startswith("--"):
                assert f" -l {name[2:]} " in texts["fish"], (entry.path, name)
    assert num_flags > 1000


def test_help_texts_cannot_leave_their_quotes():
    entry = command_table()[0]
    odd = "it's $(touch x) `y` \\' \"z\""
    flag = Flag(names=("--odd",), value="", choices=(), help=odd, notes="", section="Options")
    changed = type(entry)(
        path=(), usage="sapwood", help="", flags=(flag,), children=entry.children[:0]
    )
    assert "it\\'s $(touch x) `y` \\\\\\' \"z\"'" in fish_script([changed])


def test_a_first_sentence_is_one_line_without_its_stop():
    assert first_sentence("Reads\n  a file. Then more.\n\nAnd more.") == "Reads a file"
    assert first_sentence("Version 1.2 of it.") == "Version 1.2 of it"


def test_the_command_prints_a_script_and_refuses_other_shells(capsys):
    assert main(["completion", "bash"]) == 0
    assert "complete -o bashdefault -o default -F _sapwood sapwood\n" in capsys.readouterr().out
    assert main(["completion", "tcsh"]) == 2
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in capsys.readouterr().err
