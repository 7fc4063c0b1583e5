"""Docstrings of Python's standard library: English text that every installation has.

The text is the same wherever the version of Python is the same.
"""

from __future__ import annotations

import ast
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

_OTHERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"})
"""Folders whose docstrings are not the library's, or that not every installation has."""

_STATEMENTS = ("body", "handlers", "orelse", "finalbody", "cases")
"""Fields in which statements have others. Expressions, which have none, are most of a tree."""


def library_text() -> str:
    """Docstrings of the library's top-level modules, in the order of names: to measure with."""
    return _joined(_library().glob("*.py"))


def package_text() -> str:
    """Docstrings of the modules in the library's packages, ordered by path: to calibrate with.

    This text has next to nothing in common with `library_text`.
    """
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
    """Those of modules, classes and functions, breadth first."""
    waiting: deque[ast.AST] = deque([ast.parse(source)])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            doc = ast.get_docstring(node)
            if doc:
                yield doc
        for field in _STATEMENTS:
            waiting.extend(getattr(node, field, ()))
