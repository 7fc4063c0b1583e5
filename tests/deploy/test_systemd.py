"""The systemd units start commands that exist, as nobody, and drain."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sapwood.app.cli.options import SHARED_CONFIGS, read_config_file
from sapwood.schema.config.options import ENV_PREFIX, option_specs
from tests.deploy.checks import built

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
PROGRAM = "/opt/sapwood/bin/sapwood"
every_unit = pytest.mark.parametrize("command", ["serve", "gateway"])


def unit(command: str) -> configparser.ConfigParser:
    read = configparser.ConfigParser(interpolation=None, strict=True)
    read.optionxform = str  # type: ignore[assignment,method-assign]
    read.read_string((FOLDER / f"sapwood-{command}.service").read_text("utf-8"))
    return read


@every_unit
def test_the_command_and_its_file_are_accepted(command):
    program, name, *arguments = unit(command)["Service"]["ExecStart"].split()
    assert (program, name) == (PROGRAM, command)
    assert arguments == ["--config", f"/etc/sapwood/{command}.yaml"]
    content = read_config_file(FOLDER / f"{command}.yaml")
    known = {
        key for config in SHARED_CONFIGS for spec in option_specs(config) for key in spec.file_keys
    }
    assert set(content) <= known
    flags = [
        f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}")
        for key, value in content.items()
    ]
    given = built([command, *flags])
    assert given["port"] == content["port"]
    assert float(unit(command)["Service"]["TimeoutStopSec"]) >= given["drain_timeout"] + 15


@every_unit
def test_variables_of_the_unit_are_read(command):
    names = {spec.env for config in SHARED_CONFIGS for spec in option_specs(config)}
    service = unit(command)["Service"]
    given = dict(word.split("=") for word in service["Environment"].split())
    assert set(given) <= names | {f"{ENV_PREFIX}HOME"}
    assert given["SAPWOOD_HOME"] == f"/var/cache/{service['CacheDirectory']}"
    assert given["SAPWOOD_STATE_DIR"] == f"/var/lib/{service['StateDirectory']}"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is missing")
@every_unit
def test_systemd_takes_the_unit_and_finds_it_little_exposed(command, tmp_path):
    text = (FOLDER / f"sapwood-{command}.service").read_text("utf-8")
    path = tmp_path / f"sapwood-{command}.service"
    path.write_text(text.replace(PROGRAM, sys.executable), "utf-8")
    for check in (
        ["verify", "--man=no", "--recursive-errors=no"],
        # From 0 to 100 here: systemd itself says "OK" below 45.
        ["security", "--offline=yes", "--threshold=20"],
    ):
        done = subprocess.run(
            ["systemd-analyze", *check, str(path)],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert path.name not in done.stderr, done.stderr
