import json
import subprocess
import sys
from importlib.metadata import EntryPoint, version

import click
import pytest

from sapwood.app.cli import main as main_module
from sapwood.app.cli.main import COMMANDS, main
from sapwood.base.errors import ConfigError

HEAVY = (
    "torch",
    "transformers",
    "fastapi",
    "sapwood.app.building.wiring",
    "sapwood.app.offline.llm",
)


def loaded_by(*args: str) -> list[str]:
    """The heavy modules that a command line imports, in a process of its own."""
    code = (
        "import json, sys\n"
        "from sapwood.app.cli.main import main\n"
        f"status = main({list(args)!r})\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print(json.dumps(loaded), file=sys.stderr)\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stderr.strip().splitlines()[-1])


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["pull", "--list"],
        ["pull", "--help"],
        ["serve", "--help"],
        ["chat", "--help"],
        ["generate", "--help"],
        ["check", "--help"],
    ],
)
def test_help_and_pull_import_nothing_heavy(args):
    assert loaded_by(*args) == []


def test_all_commands_can_be_imported(capsys):
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"Usage: sapwood {name}")


def test_help_lists_what_is_not_hidden(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert (f"\n  {name} " in listed) is not command.is_hidden


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sapwood {version('sapwood')}\n"


@pytest.mark.parametrize("args", [["sreve"], ["serve", "--prot", "1"], ["generate"]])
def test_wrong_usage_ends_with_2(args, capsys):
    assert main(args) == 2
    assert "Usage:" in capsys.readouterr().err


@click.command()
@click.argument("what")
def trial(what: str) -> None:
    if what == "refuse":
        raise ConfigError("the cable is too short; buy a longer one")
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "bug":
        raise ZeroDivisionError
    click.get_current_context().exit(int(what))


@pytest.fixture
def plugin(monkeypatch):
    """`trial` as a command of another package."""
    point = EntryPoint("trial", f"{__name__}:trial", main_module.PLUGIN_GROUP)
    monkeypatch.setattr(main_module, "_plugins", lambda: {"trial": point})
    monkeypatch.setitem(sys.modules, __name__, sys.modules[trial.callback.__module__])


@pytest.mark.usefixtures("plugin")
class TestPlugin:
    def test_it_is_listed_and_run(self, capsys):
        assert main(["--help"]) == 0
        assert "trial" in capsys.readouterr().out
        assert main(["trial", "3"]) == 3

    def test_a_refusal_is_a_message_without_a_stack(self, capsys):
        assert main(["trial", "refuse"]) == 1
        assert capsys.readouterr().err == "sapwood: the cable is too short; buy a longer one\n"

    def test_ctrl_c_ends_with_130(self):
        assert main(["trial", "interrupt"]) == 130

    def test_a_bug_shows_its_stack(self):
        with pytest.raises(ZeroDivisionError):
            main(["trial", "bug"])


def test_a_listed_plugin_is_not_imported(monkeypatch, capsys):
    point = EntryPoint("broken", "no.such.module:command", main_module.PLUGIN_GROUP)
    monkeypatch.setattr(main_module, "_plugins", lambda: {"broken": point})
    assert main(["--help"]) == 0
    assert "sapwood broken --help" in capsys.readouterr().out


def test_a_plugin_must_be_a_command(monkeypatch):
    point = EntryPoint("odd", "json:loads", main_module.PLUGIN_GROUP)
    monkeypatch.setattr(main_module, "_plugins", lambda: {"odd": point})
    with pytest.raises(TypeError, match=r"'odd'.*no click command"):
        main(["odd"])


def test_plugins_come_from_the_entry_points():
    names = {point.name for point in main_module._plugins().values()}
    assert names == {
        point.name for point in main_module.entry_points(group=main_module.PLUGIN_GROUP)
    }
