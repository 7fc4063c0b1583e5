"""`sapwood kernels`, with and without the example of a package that brings kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from sapwood.app.cli.kernels import kernels
from sapwood.base.errors import ConfigError

ROOT = Path(__file__).parents[3]
Sapwood = Callable[..., "subprocess.CompletedProcess[str]"]


def install(source: Path, site: Path) -> None:
    """As pip does it, which would need the network for what builds the package."""
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    (package,) = (path for path in source.iterdir() if path.is_dir())
    shutil.copytree(package, site / package.name)
    facts = site / f"{package.name}-{project['version']}.dist-info"
    facts.mkdir()
    name, version = project["name"], project["version"]
    (facts / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
    lines = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    (facts / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def with_plugin(tmp_path_factory: pytest.TempPathFactory) -> Sapwood:
    """`python -m sapwood …` where examples/hardware is installed."""
    site = tmp_path_factory.mktemp("site")
    install(ROOT / "examples/hardware", site)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sapwood", *arguments],
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_a_package_adds_kernels_and_a_kind_of_devices(with_plugin: Sapwood) -> None:
    listed = with_plugin("kernels", "list")
    assert listed.returncode == 0, listed.stderr
    names = [line.split()[0] for line in listed.stdout.splitlines() if line.strip()]
    assert names == [
        *("KERNELS", "triton", "cpu", "torch-plugin", "torch", "reference"),
        *("DEVICE", "cpu", "cuda", "xpu"),
    ]
    absent = with_plugin("kernels", "test", "--device", "xpu")
    assert absent.returncode == 1
    assert "finds no XPU; install a build of torch for XPUs" in absent.stderr


def test_the_packages_kernels_pass_the_suite_and_serve(with_plugin: Sapwood) -> None:
    tested = with_plugin("kernels", "test", "--kernels", "torch-plugin", "--dtype", "float32")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "torch-plugin on cpu, float32" in tested.stdout
    assert "FAILED" not in tested.stdout
    report = with_plugin("check", "--kernels", "torch-plugin")
    assert "torch-plugin" in report.stdout


def test_checks_that_are_not_there_are_refused() -> None:
    result = CliRunner().invoke(kernels, ["test", "--only", "nothing"])
    assert isinstance(result.exception, ConfigError)
    assert "no check 'nothing'; known: embedding" in str(result.exception)


def test_a_wrong_op_is_told_by_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sapwood.kernels.torch_ops.TorchKernels.soft_cap", lambda self, logits, cap: None
    )
    result = CliRunner(env={"COLUMNS": "120"}).invoke(
        kernels,
        ["test", "--kernels", "torch", "--only", "soft_cap", "--device", "cpu"],
    )
    assert result.exit_code == 1
    assert "FAILED: float32, heads 4/2 x 32: differs" in result.output
