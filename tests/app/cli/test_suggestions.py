import pytest

from sapwood.app.cli.main import COMMANDS, main
from sapwood.app.cli.serve import serve
from sapwood.app.cli.suggestions import PEER_COMMANDS, command_hint, flag_hint

FLAGS = {flag for param in serve.params for flag in (*param.opts, *param.secondary_opts)}


def test_the_table_names_what_exists_and_nothing_twice():
    assert set(PEER_COMMANDS.values()) <= set(COMMANDS)
    assert not PEER_COMMANDS.keys() & COMMANDS.keys()


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--max_running_requests", "; here it is written --max-running-requests"),
        ("--tempreature", ""),
    ],
)
def test_hints_for_flags(flag, hint):
    found = flag_hint(flag, FLAGS)
    assert found.startswith(hint)
    assert hint or not found


def test_a_misspelt_flag_of_a_peer_is_understood_too():
    assert "--context-length" in flag_hint("--max-modle-len", FLAGS)


def test_a_flag_that_the_command_lacks_is_not_proposed():
    assert flag_hint("--max-modle-len", {"--port"}) == ""


def test_hints_for_commands():
    assert command_hint("srve", COMMANDS) == "; did you mean serve?"
    assert command_hint("launch_server", COMMANDS) == "; did you mean serve?"
    assert command_hint("xyzzy", COMMANDS) == ""


def test_the_command_line_says_so(capsys):
    assert main(["serve", "--max-modle-len", "4096"]) == 2
    assert "has no option --max-modle-len; did you mean --context-length" in capsys.readouterr().err
    assert main(["lst"]) == 2
    assert "sapwood has no command lst; did you mean list?" in capsys.readouterr().err
    assert main(["pull", "qwen3:0.6b", "--offline"]) == 1
    assert "did you mean qwen3-0.6b or " in capsys.readouterr().err
