"""`sapwood completion`: a script that completes sapwood's commands, flags and their values.

The script is made of the command table and needs no Python when a key is pressed: starting it would
take longer than a user waits. So it is written anew after an upgrade.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence

import click

from sapwood.app.cli.command_table import CommandEntry, Flag, command_table, first_sentence


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that completes commands and flags in a shell.

    Where it goes: in bash `source <(sapwood completion bash)` in ~/.bashrc; in zsh the same with
    zsh in ~/.zshrc, after compinit; in fish a file
    ~/.config/fish/completions/sapwood.fish.
    """
    click.echo(SCRIPTS[shell](command_table()), nl=False)


def place_of(path: Sequence[str]) -> str:
    """How the scripts write where the cursor stands: "sapwood", or "sapwood bench ops"."""
    return " ".join(("sapwood", *path))


def all_names(flags: Iterable[Flag]) -> list[str]:
    return [name for flag in flags for name in flag.names]


def _known_places(table: Sequence[CommandEntry]) -> str:
    """A shell's pattern of all commands."""
    return "|".join(f"'{place_of(entry.path)}'" for entry in table if entry.path)


# ---- bash ----------------------------------------------------------------------------------------

_BASH = """\
# Completion of sapwood for bash: source <(sapwood completion bash)
_sapwood() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}}
  local place=sapwood names= children= i
  # bash gives --flag=value as three words.
  if [[ $cur == "=" ]]; then cur=
  elif [[ $prev == "=" ]]; then prev=${{COMP_WORDS[COMP_CWORD-2]}}; fi
  for ((i = 1; i < COMP_CWORD; i++)); do
    case "$place ${{COMP_WORDS[i]}}" in
      {places}) place="$place ${{COMP_WORDS[i]}}" ;;
    esac
  done
  COMPREPLY=()
  case $place in
{cases}
  esac
  if [[ $cur == -* ]]; then COMPREPLY=($(compgen -W "$names" -- "$cur"))
  else COMPREPLY=($(compgen -W "$children" -- "$cur")); fi
}}
complete -o bashdefault -o default -F _sapwood sapwood
"""


def bash_script(table: Sequence[CommandEntry]) -> str:
    return _BASH.format(
        places=_known_places(table), cases="\n".join(_bash_case(entry) for entry in table)
    )


def _bash_case(entry: CommandEntry) -> str:
    lines = [f"    '{place_of(entry.path)}')"]
    valued = [flag for flag in entry.flags if flag.value]
    if valued:
        lines.append("      case $prev in")
        lines += [
            f"        {'|'.join(flag.names)}) COMPREPLY=($(compgen -W "
            f'{shlex.quote(" ".join(flag.choices))} -- "$cur")); return ;;'
            for flag in valued
            if flag.choices
        ]
        others = all_names(flag for flag in valued if not flag.choices)
        if others:
            # Without words of ours, bash completes names of files.
            lines.append(f"        {'|'.join(others)}) return ;;")
        lines.append("      esac")
    lines.append(f"      names={shlex.quote(' '.join(all_names(entry.flags)))}")
    lines.append(f"      children={shlex.quote(' '.join(entry.children))} ;;")
    return "\n".join(lines)


# ---- zsh -----------------------------------------------------------------------------------------

_ZSH = """\
#compdef sapwood
# Completion of sapwood for zsh: source <(sapwood completion zsh), after compinit
_sapwood() {{
  local place=sapwood flag=${{words[CURRENT-1]}} word
  local -a names children
  # The value of --flag=value is completed behind its sign.
  if [[ ${{words[CURRENT]}} == --*=* ]]; then
    flag=${{words[CURRENT]%%=*}}
    compset -P '*='
  fi
  for word in "${{(@)words[2,CURRENT-1]}}"; do
    case "$place $word" in
      {places}) place="$place $word" ;;
    esac
  done
  case $place in
{cases}
  esac
  if [[ ${{words[CURRENT]}} == -* ]]; then _describe -o option names
  elif (( $#children )); then _describe command children
  else _files; fi
}}
if [[ ${{funcstack[1]}} == _sapwood ]]; then _sapwood "$@"; else compdef _sapwood sapwood; fi
"""


def zsh_script(table: Sequence[CommandEntry]) -> str:
    summaries = {entry.path: entry.summary for entry in table}
    return _ZSH.format(
        places=_known_places(table),
        cases="\n".join(_zsh_case(entry, summaries) for entry in table),
    )


def _zsh_case(entry: CommandEntry, summaries: Mapping[tuple[str, ...], str]) -> str:
    lines = [f"    '{place_of(entry.path)}')"]
    valued = [flag for flag in entry.flags if flag.value]
    if valued:
        lines.append("      case $flag in")
        lines += [
            f"        {'|'.join(flag.names)}) compadd -- {shlex.join(flag.choices)}; return ;;"
            for flag in valued
            if flag.choices
        ]
        others = all_names(flag for flag in valued if not flag.choices)
        if others:
            lines.append(f"        {'|'.join(others)}) _files; return ;;")
        lines.append("      esac")
    names = [(name, first_sentence(flag.help)) for flag in entry.flags for name in flag.names]
    children = [(name, summaries[*entry.path, name]) for name in entry.children]
    lines.append(f"      names=({_described(names)})")
    lines.append(f"      children=({_described(children)}) ;;")
    return "\n".join(lines)


def _described(rows: Sequence[tuple[str, str]]) -> str:
    return " ".join(shlex.quote(f"{name}:{text}") for name, text in rows)


# ---- fish ----------------------------------------------------------------------------------------

_FISH = """\
# Completion of sapwood for fish: sapwood completion fish > ~/.config/fish/completions/sapwood.fish
function __sapwood_at --description 'Whether the cursor stands behind this command'
    set -l place sapwood
    for word in (commandline -opc)[2..-1]
        if contains -- "$place $word" {places}
            set place "$place $word"
        end
    end
    test "$place" = "$argv[1]"
end
complete -c sapwood -e
{lines}
"""


def fish_script(table: Sequence[CommandEntry]) -> str:
    summaries = {entry.path: entry.summary for entry in table}
    places = " ".join(f"'{place_of(entry.path)}'" for entry in table if entry.path)
    lines: list[str] = []
    for entry in table:
        is_here = f"__sapwood_at {_fish_quote(place_of(entry.path))}"
        at = f"complete -c sapwood -n {_fish_quote(is_here)}"
        lines += [
            f"{at} -f -a {name} -d {_fish_quote(summaries[*entry.path, name])}"
            for name in entry.children
        ]
        lines += [f"{at} {_fish_flag(flag)}" for flag in entry.flags]
    return _FISH.format(places=places, lines="\n".join(lines))


def _fish_flag(flag: Flag) -> str:
    spellings = [
        f"-l {name.removeprefix('--')}" if name.startswith("--") else f"-s {name[1:]}"
        for name in flag.names
    ]
    value: list[str] = []
    if flag.choices:
        value = ["-x", "-a", _fish_quote(" ".join(flag.choices))]
    elif flag.value:
        value = ["-r"]
    return " ".join([*spellings, *value, "-d", _fish_quote(first_sentence(flag.help))])


def _fish_quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


SCRIPTS: Mapping[str, Callable[[Sequence[CommandEntry]], str]] = {
    "bash": bash_script,
    "zsh": zsh_script,
    "fish": fish_script,
}
