"""Makes an environment for a client, once, below build/clients."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from tests.clients.catalogue import Client

ROOT = Path(__file__).parents[2]
HOME = ROOT / "build" / "clients"


def environment(name: str, client: Client) -> Path:
    """The environment's Python; CalledProcessError if pip or npm fails."""
    folder = HOME / name
    python = folder / "bin" / "python"
    asked = hashlib.sha256(repr((client.requires, client.npm, client.bare)).encode()).hexdigest()
    mark = folder / "complete"
    if mark.is_file() and mark.read_text("utf-8") == asked:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    packages = (
        folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    )
    if client.borrows:
        own = sysconfig.get_path("purelib")
        (packages / "zz-borrowed.pth").write_text(f"{own}\n", "utf-8")
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if client.bare:
        subprocess.run([*pip, "--no-deps", *client.bare], check=True)
    if client.requires:
        subprocess.run([*pip, *client.requires], check=True)
    if client.npm:
        npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder)]
        subprocess.run([*npm, *client.npm], check=True)
    for module in client.stand_ins:
        (packages / module).mkdir()
        shutil.copy(Path(__file__).with_name("stand_in.py"), packages / module / "__init__.py")
    mark.write_text(asked, "utf-8")
    return python


def version_in(python: Path, package: str) -> str:
    of_npm = python.parents[1] / "node_modules" / package / "package.json"
    if of_npm.is_file():
        return str(json.loads(of_npm.read_text("utf-8"))["version"])
    script = f"import importlib.metadata as m; print(m.version({package!r}))"
    told = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    return told.stdout.strip()
