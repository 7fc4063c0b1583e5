"""What somebody may have meant who gave a flag or command that sapwood does not have."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from sapwood.app.cli.llama_cpp_flags import LLAMA_CPP_ROWS
from sapwood.app.cli.peer_flag import Fate
from sapwood.app.cli.vllm_flags import VLLM_ROWS

PEER_COMMANDS: Mapping[str, str] = {
    "launch_server": "serve",
    "start": "serve",
    "server": "serve",
    "run-batch": "generate",
    "complete": "generate",
    "quantize": "convert",
    "download": "pull",
    "ls": "list",
    "remove": "rm",
    "delete": "rm",
    "show": "check",
    "status": "ps",
    "doctor": "check",
}
"""Commands of Ollama, vLLM, SGLang and llama.cpp, and those that do the same here."""


def flag_hint(flag: str, known: Collection[str]) -> str:
    """What to say of a flag that a command does not have, beginning with "; "; "" if nothing is
    like it.

    known  the command's own flags
    """
    asked = flag.partition("=")[0].replace("_", "-")
    if asked in known:
        return f"; here it is written {asked}"
    theirs = {
        row.flag: row.says
        for row in (*VLLM_ROWS.values(), *LLAMA_CPP_ROWS.values())
        if row.fate is Fate.SAME and row.says in known
    }
    close = difflib.get_close_matches(asked, [*sorted(known), *theirs], n=3, cutoff=0.7)
    return _did_you_mean([theirs.get(name, name) for name in close])


def command_hint(name: str, known: Collection[str]) -> str:
    """The same of a command."""
    if PEER_COMMANDS.get(name) in known:
        return _did_you_mean([PEER_COMMANDS[name]])
    return _did_you_mean(difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5))


def _did_you_mean(names: list[str]) -> str:
    different = list(dict.fromkeys(names))
    return f"; did you mean {' or '.join(different)}?" if different else ""
