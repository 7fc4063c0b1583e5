"""The bundled libraries are what web/ builds, and their licences are beside them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
WEB = ROOT / "web"
LIBRARIES = Path(str(resources.files("sapwood.frontends.web") / "static" / "libraries"))
LIMIT_S = 240


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def locked() -> dict[str, dict[str, object]]:
    """name -> what the lock file says of the package."""
    lock = json.loads((WEB / "package-lock.json").read_text("utf-8"))
    return {name.removeprefix("node_modules/"): one for name, one in lock["packages"].items()}


@pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm on the path")
def test_the_committed_bundle_is_what_the_sources_build(tmp_path: Path) -> None:
    for name in ("package.json", "package-lock.json", ".npmrc", "build.mjs", "libraries.js"):
        shutil.copy(WEB / name, tmp_path)
    shutil.copytree(WEB / "licenses", tmp_path / "licenses")
    command = ["npm", "ci", "--prefer-offline", "--no-audit", "--no-fund"]
    installed = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if installed.returncode and re.search(
        r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ETIMEDOUT|ECONNRESET|ENETUNREACH", installed.stderr
    ):
        pytest.skip("npm reaches no registry")
    assert installed.returncode == 0, installed.stderr
    subprocess.run(["node", "build.mjs", "out"], cwd=tmp_path, check=True, timeout=LIMIT_S)
    built, committed = files_of(tmp_path / "out"), files_of(LIBRARIES)
    assert sorted(built) == sorted(committed)
    different = [name for name in built if built[name] != committed[name]]
    assert different == [], "run `make web`, and commit what it builds"


def test_versions_are_exact_and_no_registry_is_named() -> None:
    package = json.loads((WEB / "package.json").read_text("utf-8"))
    wanted = package["dependencies"] | package["devDependencies"]
    packages = locked()
    assert {name: packages[name]["version"] for name in wanted} == wanted
    assert "resolved" not in (WEB / "package-lock.json").read_text("utf-8")
    assert all("integrity" in one for name, one in packages.items() if name)


def test_every_bundled_library_has_its_licence() -> None:
    text = (LIBRARIES / "LICENSES.txt").read_text("utf-8")
    package = json.loads((WEB / "package.json").read_text("utf-8"))
    for name, version in package["dependencies"].items():
        assert f"{name} {version}: " in text
    assert "SIL OPEN FONT LICENSE" in text


def test_the_bundle_needs_nothing_else() -> None:
    """Every address in the style sheet is a font that is there, in the one format that is kept."""
    fonts = re.findall(r"url\(\"?([^)\"]+)", (LIBRARIES / "katex.css").read_text("utf-8"))
    assert len(fonts) > 15
    assert all((LIBRARIES / font).is_file() and font.endswith(".woff2") for font in fonts)
    assert {path.suffix for path in LIBRARIES.rglob("*.*")} == {".js", ".css", ".txt", ".woff2"}
