"""No two modules import each other, not even by a way round, inside functions or for types."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"
COMPILED = {"sapwood.kernels.cpu._native"}
"""Extension modules, which import nothing of ours."""


def modules(root: Path) -> dict[str, Path]:
    found = {}
    for path in root.rglob("*.py"):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(tree: ast.AST, known: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner not in COMPILED:
                    yield inner if inner in known else node.module


def circles(imported: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach each other. Tarjan's algorithm (1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_ones: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        open_ones.append(name)
        for other in imported[name]:
            if other not in order:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in open_ones:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            at = open_ones.index(name)
            if len(open_ones) - at > 1:
                found.append(sorted(open_ones[at:]))
            del open_ones[at:]

    for name in imported:
        if name not in order:
            visit(name)
    return found


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_no_modules_import_each_other() -> None:
    """Review 2, number 14."""
    known = modules(SOURCE)
    imported = {
        name: (set(imports(ast.parse(path.read_bytes()), known)) & known.keys()) - {name}
        for name, path in known.items()
    }
    assert circles(imported) == []
