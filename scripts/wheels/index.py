"""The index that pip reads, as plain files: dist/index/KIND/ for each kind of machine.

    pip install --extra-index-url https://HOST/index/x86_64/ sapwood

Every link has the file's SHA-256, which pip checks, and the Python that it needs. The sdist is in
each of them. A kind without a wheel, and a link without its file, are errors.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from email.parser import HeaderParser
from pathlib import Path
from urllib.parse import quote, unquote

SDIST = ".tar.gz"
_PAGE = """<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta name="pypi:repository-version" content="1.0">
<title>{title}</title>
</head>
<body>
<h1>{title}</h1>
{links}
</body>
</html>
"""


class ListError(Exception):
    """A file that the index needs is missing, or is not the one that a page names."""


def main(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Write the index of a folder of wheels")
    parser.add_argument("dist", type=Path, help="the folder with wheels and sdists")
    parser.add_argument("kinds", nargs="+", help="kinds of machine: x86_64 aarch64")
    asked = parser.parse_args(args)
    try:
        for path in write(asked.dist, asked.kinds):
            sys.stdout.write(f"{path}\n")
    except ListError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def write(dist: Path, kinds: Sequence[str]) -> list[Path]:
    """The folders written, one per kind."""
    sdists = sorted(dist.glob(f"sapwood-*{SDIST}"))
    if not sdists:
        raise ListError(f"{dist} has no sdist (sapwood-VERSION{SDIST}); make wheel builds it")
    written = []
    for kind in kinds:
        wheels = sorted(dist.glob(f"sapwood-*_{kind}.whl"))
        if not wheels:
            raise ListError(f"{dist} has no wheel for {kind}; make wheel builds it")
        folder = dist / "index" / kind / "sapwood"
        folder.mkdir(parents=True, exist_ok=True)
        links = "\n".join(link(path) for path in [*wheels, *sdists])
        page = _PAGE.format(title=f"sapwood for {html.escape(kind)}", links=links)
        (folder / "index.html").write_text(page, encoding="utf-8")
        every = _PAGE.format(title=html.escape(kind), links='<a href="sapwood/">sapwood</a><br>')
        (folder.parent / "index.html").write_text(every, encoding="utf-8")
        check(folder / "index.html")
        written.append(folder.parent)
    return written


def link(path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    python = html.escape(requires_python(path), quote=True)
    href = f"../../../{quote(path.name)}#sha256={digest}"
    return f'<a href="{href}" data-requires-python="{python}">{html.escape(path.name)}</a><br>'


def check(page: Path) -> list[Path]:
    """The files that the page names; ListError if one is missing or is another."""
    found = []
    for line in page.read_text(encoding="utf-8").splitlines():
        if not line.startswith("<a "):
            continue
        target, _, digest = line.split('"')[1].partition("#sha256=")
        path = (page.parent / unquote(target)).resolve()
        if not path.is_file():
            raise ListError(f"{page} names {path.name}, which is missing")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ListError(f"{path.name} is not the file that {page} names: write it anew")
        found.append(path)
    return found


def requires_python(path: Path) -> str:
    """Of the metadata inside; ListError if the file is no wheel or sdist."""
    try:
        if path.name.endswith(SDIST):
            with tarfile.open(path) as archive:
                entry = archive.extractfile(f"{path.name.removesuffix(SDIST)}/PKG-INFO")
                text = entry.read() if entry else b""
        else:
            with zipfile.ZipFile(path) as wheel:
                [name] = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
                text = wheel.read(name)
    except (tarfile.TarError, zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise ListError(f"{path.name} cannot be read: {error}") from error
    return HeaderParser().parsestr(text.decode("utf-8")).get("Requires-Python", "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
