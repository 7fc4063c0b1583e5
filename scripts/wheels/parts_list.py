"""The list of a wheel's parts (SBOM) in CycloneDX's JSON.

Parts that are in the wheel (required): the chat page's libraries and nanobind, with exact versions.
Packages that pip installs beside it: those that pyproject.toml names, with the versions it admits.
"""

from __future__ import annotations

import json
import re
import tomllib
import uuid
from importlib.metadata import version
from pathlib import Path

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*([^;]*)(?:;.*)?")
_LICENCE = re.compile(r"^(\S+) (\d\S*): (.+)$", re.M)
_RULE = re.compile(r"^=+$\n", re.M)


def of(root: Path, wheel: Path) -> dict[str, object]:
    """CycloneDX 1.6 of the wheel that was built from the checkout `root`."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    release = wheel.name.split("-")[1]
    own = f"pkg:pypi/sapwood@{release}"
    parts = [*bundled(root), *required(project)]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        # The same wheel has the same number, so that two builds of it are the same bytes.
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{own}/{wheel.name}')}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": own,
                "name": "sapwood",
                "version": release,
                "purl": own,
                "licenses": [{"license": {"id": project["license"]}}],
            }
        },
        "components": parts,
        "dependencies": [{"ref": own, "dependsOn": [part["bom-ref"] for part in parts]}],
    }


def bundled(root: Path) -> list[dict[str, object]]:
    """What lies inside of the wheel, though others wrote it."""
    text = (root / "src/sapwood/frontends/web/static/libraries/LICENSES.txt").read_text("utf-8")
    parts = [
        _part(f"pkg:npm/{name}@{release}", name, release, expression=licence)
        for block in _RULE.split(text)
        if (found := _LICENCE.fullmatch(block.strip()))
        for name, release, licence in [found.groups()]
    ]
    wanted = json.loads((root / "web/package.json").read_text("utf-8"))["dependencies"]
    listed = {str(part["name"]): part["version"] for part in parts}
    if missing := [name for name in wanted if listed.get(name) != wanted[name]]:
        raise ValueError(f"LICENSES.txt lacks {', '.join(missing)} of web/package.json; make web")
    release = version("nanobind")
    return [
        *parts,
        _part(f"pkg:pypi/nanobind@{release}", "nanobind", release, expression="BSD-3-Clause"),
    ]


def required(project: dict[str, object]) -> list[dict[str, object]]:
    requirements = project["dependencies"]
    assert isinstance(requirements, list)
    parts = []
    for requirement in requirements:
        found = _REQUIREMENT.fullmatch(requirement)
        assert found is not None, requirement
        name, admitted = found[1].lower().replace("_", "-"), found[2].strip()
        exact = admitted.removeprefix("==") if admitted.startswith("==") else None
        purl = f"pkg:pypi/{name}" + (f"@{exact}" if exact else "")
        part = _part(purl, name, exact)
        part["properties"] = [{"name": "sapwood:requirement", "value": requirement}]
        parts.append(part)
    return parts


def _part(
    purl: str, name: str, release: str | None, *, expression: str | None = None
) -> dict[str, object]:
    part: dict[str, object] = {"type": "library", "bom-ref": purl, "name": name, "purl": purl}
    if release is not None:
        part["version"] = release
    if expression is not None:
        part["licenses"] = [{"expression": expression}]
    return part
