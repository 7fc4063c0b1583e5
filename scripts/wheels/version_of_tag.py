"""The version of sapwood that is being built: scikit-build-core asks this file (pyproject.toml).

In this order: what the environment's SAPWOOD_VERSION says (`make wheel` sets it for nightly
builds), the sdist's own PKG-INFO, the newest tag vX.Y.Z behind this commit, FIRST if there is
none:

    at the tag v0.2.0                     0.2.0
    three commits later, at 1a2b3c4       0.2.1.dev3+g1a2b3c4
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIRST = "0.1.0"
"""The version that the first tag will have."""
GIVEN = "SAPWOOD_VERSION"

_DESCRIBED = re.compile(r"v(\d+(?:\.\d+)*)((?:a|b|rc)\d+)?-(\d+)-g([0-9a-f]+)")


def dynamic_metadata(field: str, settings: Mapping[str, object]) -> str:
    """What scikit-build-core calls for the field `version`."""
    if field != "version" or settings:
        raise ValueError(f"only the version is known here, without settings; got {field}")
    return os.environ.get(GIVEN) or packed_version(ROOT) or version_of(described(ROOT))


def packed_version(root: Path) -> str | None:
    """The version of an unpacked sdist; None for a checkout."""
    info = root / "PKG-INFO"
    found = re.search(r"^Version: (\S+)$", info.read_text("utf-8"), re.M) if info.exists() else None
    return found[1] if found else None


def described(root: Path) -> str | None:
    """`git describe` of the checkout, as v0.2.0-3-g1a2b3c4; None without git or without a tag."""
    return _git(root, "describe", "--tags", "--long", "--match", "v[0-9]*")


def version_of(description: str | None) -> str:
    """A version by PEP 440. A commit after a tag comes before the next one: 0.2.1.dev3.
    ValueError for a tag that is no version."""
    if description is None:
        return FIRST
    found = _DESCRIBED.fullmatch(description)
    if found is None:
        raise ValueError(f"the tag of {description} is no version such as v0.2.0 or v0.2.0rc1")
    release, pre, commits, commit = found[1], found[2] or "", int(found[3]), found[4]
    if commits == 0:
        return release + pre
    if pre:
        following = f"{release}{pre.rstrip('0123456789')}{int(re.sub(r'[^0-9]', '', pre)) + 1}"
    else:
        *front, last = release.split(".")
        following = ".".join([*front, str(int(last) + 1)])
    return f"{following}.dev{commits}+g{commit}"


def nightly_version(root: Path = ROOT) -> str:
    """As version_of, but each commit has its own version also before the first tag."""
    description = described(root)
    if description is not None:
        return version_of(description)
    commits, commit = (
        _git(root, "rev-list", "--count", "HEAD"),
        _git(root, "rev-parse", "--short", "HEAD"),
    )
    return f"{FIRST}.dev{commits}+g{commit}" if commits and commit else FIRST


def _git(root: Path, *args: str) -> str | None:
    if not (root / ".git").exists():
        return None  # a folder inside of somebody else's checkout has not its versions
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
