"""Renders the chart as helm does, for the few template functions that it uses; any other fails."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_GUARD = re.compile(r"lt \(int (\S+)\) \(add (\S+) (\S+) (\d+) \| int\)")


class RenderError(Exception):
    """The chart itself refuses these values, or uses what is not known here."""


def rendered(chart: Path, values: Mapping[str, Any], *, release: str) -> list[dict[str, Any]]:
    """All objects of the chart; `values` are laid over values.yaml."""
    defaults = yaml.safe_load((chart / "values.yaml").read_text("utf-8"))
    scope = {
        "Values": laid_over(defaults, values),
        "Release": {"Name": release, "Namespace": "models"},
    }
    found: list[dict[str, Any]] = []
    for path in sorted((chart / "templates").glob("*.yaml")):
        text = _render(path.read_text("utf-8"), scope)
        found += [one for one in yaml.safe_load_all(text) if one is not None]
    return found


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        if name not in below:
            raise RenderError(f"values.yaml has no {name}")
        both = isinstance(value, dict) and isinstance(below[name], dict) and below[name]
        merged[name] = laid_over(below[name], value) if both else value
    return merged


def _render(text: str, scope: Mapping[str, Any]) -> str:
    out: list[str] = []
    shown = [True]
    for part in re.split(r"(\{\{-? .*? \}\})", text):
        if not part.startswith("{{"):
            if all(shown):
                out.append(part)
            continue
        if part.startswith("{{-") and out:
            out[-1] = out[-1].rstrip()
        code = part.removeprefix("{{").removeprefix("-").removesuffix("}}").strip()
        if code.startswith("if "):
            shown.append(_holds(code.removeprefix("if "), scope))
        elif code == "else":
            shown[-1] = not shown[-1]
        elif code == "end":
            shown.pop()
        elif all(shown):
            out.append(_value(code, scope))
    if len(shown) != 1:
        raise RenderError("an if has no end")
    return "".join(out)


def _holds(code: str, scope: Mapping[str, Any]) -> bool:
    if guard := _GUARD.fullmatch(code):
        least = sum(int(_looked_up(guard[i], scope)) for i in (2, 3)) + int(guard[4])
        return int(_looked_up(guard[1], scope)) < least
    if code.startswith("not "):
        return not _looked_up(code.removeprefix("not "), scope)
    return bool(_looked_up(code, scope))


def _value(code: str, scope: Mapping[str, Any]) -> str:
    if refusal := re.fullmatch(r'fail "(.*)"', code):
        raise RenderError(refusal[1])
    if block := re.fullmatch(r"toYaml (\S+) \| nindent (\d+)", code):
        lines = yaml.safe_dump(_looked_up(block[1], scope)).rstrip("\n").split("\n")
        return "".join("\n" + " " * int(block[2]) + line for line in lines)
    if quoted := re.fullmatch(r"(\S+) \| quote", code):
        return json.dumps(str(_looked_up(quoted[1], scope)))
    return str(_looked_up(code, scope))


def _looked_up(path: str, scope: Mapping[str, Any]) -> Any:
    if not re.fullmatch(r"(\.\w+)+", path):
        raise RenderError(f"what is {path!r}?")
    found: Any = scope
    for name in path.split(".")[1:]:
        if name not in found:
            raise RenderError(f"there is no {path}")
        found = found[name]
    return found
