import subprocess
import sys
from pathlib import Path

from sapwood.bench.environment import (
    cpu_model,
    describe_environment,
    git_commit,
    package_versions,
    usable_cores,
)


def test_commit_with_changes_is_marked():
    answers = {"rev-parse": "abc123\n", "status": " M file.py\n"}
    assert git_commit(Path(), lambda *args: answers[args[2]]) == "abc123+"
    answers["status"] = ""
    assert git_commit(Path(), lambda *args: answers[args[2]]) == "abc123"


def test_no_commit_outside_a_checkout(tmp_path):
    assert git_commit(tmp_path) is None


def test_no_commit_without_git():
    def run(*arguments: str) -> str:
        raise FileNotFoundError("git")

    assert git_commit(Path(), run) is None


def test_cpu_model_is_read(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Fast CPU 9000\n")
    assert cpu_model(cpuinfo) == "Fast CPU 9000"
    assert cpu_model(tmp_path / "missing")


def test_only_installed_packages_have_versions():
    assert list(package_versions(["click", "no-such-package-anywhere"])) == ["click"]


def test_a_row_names_machine_and_versions():
    environment = describe_environment()
    assert environment.num_cores == usable_cores() >= 1
    assert environment.versions["sapwood"] in str(environment)
    assert environment.cpu in str(environment)
    assert environment.date.endswith("+00:00")


def test_measuring_a_server_needs_no_torch():
    code = (
        "import sys, sapwood.bench.cli, sapwood.bench.commands, sapwood.bench.peers.process; "
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
