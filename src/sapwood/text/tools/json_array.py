"""A JSON array of calls, which a grammar makes any model write when a call is required.

[{"name": "f", "parameters": {…}}, …]
"""

from __future__ import annotations

from sapwood.text.source import Steps
from sapwood.text.tools.format import CallSource, ToolFormat
from sapwood.text.tools.json_call import json_call_list


class JsonArray(ToolFormat):
    """The calls of a model whose usual format is `model`, from which call ids are taken."""

    name = "json_array"
    openings = ()
    opens_answer = ("[",)
    tags = ("[", "]", ",")

    def __init__(self, model: ToolFormat | None = None) -> None:
        self._model = model

    def new_call_id(self) -> str:
        return super().new_call_id() if self._model is None else self._model.new_call_id()

    def calls(self, source: CallSource, opening: str) -> Steps[None]:
        yield from json_call_list(source)
