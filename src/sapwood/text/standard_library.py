"""Docstrings of Python's standard library: English text that every installation has, and the same
for one Python version."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

_OTHERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"})
"""Folders whose docstrings are not the library's, or that not every installation has."""


def library_text() -> str:
    """Of the modules at the top of the library, in the order of their names: to measure with."""
    return _joined(_library().glob("*.py"))


def package_text() -> str:
    """Of the modules in its packages, in the order of their paths: to calibrate with, as it has
    next to nothing in common with `library_text`."""
    library = _library()
    return _joined(
        path
        for path in library.glob("*/**/*.py")
        if not _OTHERS & set(path.relative_to(library).parts)
    )


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _joined(paths: Iterable[Path]) -> str:
    return "\n\n".join(doc for path in sorted(paths) for doc in _docstrings(path.read_bytes()))


def _docstrings(source: bytes) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            doc = ast.get_docstring(node)
            if doc:
                yield doc
