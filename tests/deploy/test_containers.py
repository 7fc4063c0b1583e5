"""Containerfiles and the compose file name what exists: files, options, ports and paths."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.checks import built, engine_paths, gateway_paths

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy"
ENGINE, GATEWAY = FOLDER / "Containerfile", FOLDER / "Containerfile.gateway"
every_image = pytest.mark.parametrize("path", [ENGINE, GATEWAY], ids=lambda path: path.name)


def stages(path: Path) -> list[list[tuple[str, str]]]:
    """(instruction, rest) of each stage; the first holds what is before FROM."""
    text = re.sub(r"^#.*\n", "", path.read_text("utf-8"), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    found: list[list[tuple[str, str]]] = [[]]
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "FROM":
            found.append([])
        found[-1].append((word, " ".join(rest.split())))
    return found


def settings(path: Path) -> dict[str, str]:
    [text] = [rest for word, rest in stages(path)[-1] if word == "ENV"]
    return dict(word.split("=", 1) for word in text.split())


def compose() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "compose.yaml").read_text("utf-8"))["services"]


@every_image
def test_the_last_stage_is_nobody_and_has_no_compiler(path):
    [_, builder, last] = stages(path)
    assert builder[0][1].endswith(" AS builder")
    users = [rest for word, rest in last if word == "USER"]
    assert users == ["10001:10001"]
    assert "--uid 10001" in dict(last)["RUN"]
    for word, rest in last:
        assert "apt-get" not in rest, word
        assert "pip" not in rest, word
    assert ("COPY", "--from=builder /opt/sapwood /opt/sapwood") in last


@every_image
def test_the_health_check_asks_the_port_and_a_path_that_needs_no_key(path):
    last = dict(stages(path)[-1])
    known = engine_paths() if path == ENGINE else gateway_paths()
    command = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])
    assert command[:2] == ["python", "-c"]
    ast.parse(command[2])
    assert re.search(r"\+ '(/\w+)'", command[2])[1] in known
    given = settings(path)
    assert "os.environ['SAPWOOD_PORT']" in command[2]
    assert given["SAPWOOD_PORT"] == last["EXPOSE"]
    assert given["SAPWOOD_HOME"] == last["VOLUME"] == last["WORKDIR"]
    arguments = [*json.loads(last["CMD"]), "--host", given["SAPWOOD_HOST"]]
    assert built([*arguments, "--port", given["SAPWOOD_PORT"]])["host"] == "0.0.0.0"


@every_image
def test_what_is_copied_and_installed_exists(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    text = path.read_text("utf-8")
    if path == ENGINE:
        [extras] = re.findall(r"^ARG EXTRAS=(.*)$", text, re.MULTILINE)
        assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
        # The pattern by which the file finds torch's version.
        pattern = re.search(r"s/\^ \*\"\\\((torch==)", text)[1]
        assert [one for one in project["project"]["dependencies"] if one.startswith(pattern)]
    else:
        assert re.search(r"--no-cache-dir --group (\w+)", text)[1] in project["dependency-groups"]
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    kept = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    needed = {"CMakeLists.txt", "pyproject.toml", "src", "scripts", "LICENSE"}
    assert {*needed, project["project"]["readme"]} <= set(kept)


def test_the_lines_that_install_torch_find_its_version():
    line = re.search(r'torch="\$\((sed .*) pyproject\.toml\)"', ENGINE.read_text("utf-8"))[1]
    done = subprocess.run(
        ["bash", "-c", f"{line} {ROOT / 'pyproject.toml'}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(r"torch==[\d.]+\n", done.stdout)


@every_image
def test_a_linter_finds_nothing(path):
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is missing")
    done = subprocess.run(["hadolint", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_services_start_commands_that_are_accepted():
    services = compose()
    engine, gateway = (
        built([re.sub(r"\$\{\w+:-(.*?)\}", r"\1", word) for word in services[name]["command"]])
        for name in ("engine", "gateway")
    )
    assert engine["model"] == "smollm2-135m"
    assert gateway["urls"] == (f"http://engine:{engine['port']}",)
    for name, path, given in (("engine", ENGINE, engine), ("gateway", GATEWAY, gateway)):
        service = services[name]
        # The health check of the image asks this port.
        assert str(given["port"]) == settings(path)["SAPWOOD_PORT"]
        assert (FOLDER / service["build"]["context"] / service["build"]["dockerfile"]) == (
            FOLDER / ".." / path.relative_to(ROOT)
        )
        assert float(service["stop_grace_period"].removesuffix("s")) >= given["drain_timeout"] + 15
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        assert service["volumes"] == [f"{name}:{settings(path)['SAPWOOD_HOME']}"]
    assert services["gateway"]["ports"] == [f"127.0.0.1:{gateway['port']}:{gateway['port']}"]
    assert "ports" not in services["engine"]
