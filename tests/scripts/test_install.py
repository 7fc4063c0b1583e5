"""What is said while sapwood is installed, and that nothing that fails is hidden."""

from __future__ import annotations

import io
import sys
import tomllib
from pathlib import Path

import pytest

from scripts import install
from scripts.install import CommandError, Screen

STEPS = "print('[1/3] Building a'); print('note'); print('[3/3] Linking', flush=True)"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_stage_tells_its_steps_and_its_time() -> None:
    out = io.StringIO()
    output = Screen(out, note_every_s=0.0).stage("kernels", python(STEPS), verb="compiling")
    assert output.splitlines() == ["[1/3] Building a", "note", "[3/3] Linking"]
    lines = out.getvalue().splitlines()
    assert lines[0] == "compiling kernels ..."
    assert lines[1].startswith("compiling kernels 1/3, 0:")
    assert lines[3].startswith("compiling kernels 3/3, 0:")
    assert lines[-1].startswith("kernels: 0:")


def test_where_no_one_watches_progress_is_told_now_and_then() -> None:
    out = io.StringIO()
    Screen(out, note_every_s=1000.0).stage("kernels", python(STEPS), verb="compiling")
    assert len(out.getvalue().splitlines()) == 2


def test_on_a_terminal_one_line_changes() -> None:
    out = Terminal()
    Screen(out).stage("torch", python(STEPS))
    *_, last = out.getvalue().split("\r\033[K")
    assert last.startswith("torch: 0:")
    assert out.getvalue().count("\n") == 1


def test_a_command_that_fails_shows_what_it_said() -> None:
    out = io.StringIO()
    with pytest.raises(CommandError, match=r"torch: .* ended with 3"):
        Screen(out).stage("torch", python("import sys; print('no space left'); sys.exit(3)"))
    assert "no space left\n" in out.getvalue()


def test_make_does_not_limit_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAKEFLAGS", "-j1 --jobserver-auth=3,4")
    code = "import os; print('MAKEFLAGS' in os.environ)"
    assert Screen(io.StringIO()).stage("x", python(code)) == "False\n"


@pytest.mark.parametrize("is_dev", [False, True])
def test_everything_that_the_project_names_is_installed(is_dev: bool) -> None:
    project = tomllib.loads((install.ROOT / "pyproject.toml").read_text("utf-8"))
    torch, others = install.requirements(project, is_dev=is_dev)
    assert torch.startswith("torch==")
    named = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    assert set(named) - {torch} <= set(others)
    assert is_dev == (set(project["project"]["optional-dependencies"]["dev"]) <= set(others))


def test_no_compiler_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    said = install.missing_kernels("*** CMake configuration failed")
    assert "There is no C++ compiler" in said
    assert "apt-get install g++" in said


def test_errors_of_the_compiler_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.shutil, "which", lambda name: "/bin/c++")
    output = "rows.isa.cpp:3: error: no\n*** CMake build failed\nSuccessfully installed sapwood\n"
    said = install.missing_kernels(output)
    assert "error: no" in said
    assert "Successfully" not in said


class Recorder(Screen):
    """Runs nothing."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.stages: list[str] = []
        self.said: list[str] = []

    def stage(self, name: str, command: object, *, verb: str = "installing") -> str:
        self.stages.append(name)
        return ""

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize(
    ("is_dev", "is_built", "has_compiler", "status", "stamps"),
    [
        (False, True, True, 0, [".installed"]),
        (True, True, True, 0, [".installed", ".installed-dev"]),
        (False, False, True, 0, []),  # it serves, and is asked again next time
        (False, False, False, 0, []),
        (True, False, False, 0, []),
        (True, False, True, 1, []),  # tests of kernels would be skipped without a word
    ],
)
def test_what_make_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_dev: bool,
    is_built: bool,
    has_compiler: bool,
    status: int,
    stamps: list[str],
) -> None:
    path = "/bin/c++" if has_compiler else None
    monkeypatch.setattr(install.shutil, "which", lambda name: path)
    if is_built:
        module = tmp_path / "lib/python3/site-packages/sapwood/kernels/cpu/_native.so"
        module.parent.mkdir(parents=True)
        module.touch()
    for stamp in install.STAMPS:
        (tmp_path / stamp).touch()  # of an earlier installation
    screen = Recorder()
    assert install.install(tmp_path, is_dev=is_dev, screen=screen) == status
    assert screen.stages == ["virtual environment", "torch", "packages", "kernels"]
    assert sorted(found.name for found in tmp_path.glob(".installed*")) == stamps
    assert len(screen.said) == (0 if is_built else 1)


def test_pip_of_debian_12_knows_every_option() -> None:
    """Its 23.0 has no -C, the short form of --config-settings."""
    options = {word for word in install.editable("all") if word.startswith("-")}
    assert options == {"-v", "--no-compile", "--no-deps", "--no-build-isolation"} | {
        "--config-settings",
        "--editable",
    }
