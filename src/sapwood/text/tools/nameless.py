"""Which tool a call means that does not name one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sapwood.text.tools.argument_types import fits


def tool_of(arguments: Mapping[str, Any], tools: Mapping[str, Any]) -> str | None:
    """The only tool, or the only one that takes these arguments; None if it cannot be told.

    tools  name of each tool -> JSON schema of its arguments
    """
    if len(tools) == 1:
        return next(iter(tools))
    fitting = [name for name, schema in tools.items() if fits(arguments, schema)]
    return fitting[0] if len(fitting) == 1 else None
