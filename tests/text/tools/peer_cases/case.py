"""What a case of a peer's detector tests is, and the tools that the cases name.

A case has the name of SGLang's test, the texts are our own. Parts of a test that look at SGLang's
insides (buffers, indexes) have no case, nor do detectors of formats that are not read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """
    name     file and test of SGLang's, and what tells cases of one test apart
    text     what the model writes
    calls    the calls that SGLang's test asks for
    content  the content that it asks for, white space at the ends aside; None: it does not say
    cut      name of the call in which the text is cut off, and the beginning of its arguments
    differs  key of the reason in docs/tool-calls.md if sapwood reads something else; "" if not
    """

    name: str
    parser: str
    text: str
    calls: Sequence[Call] = ()
    content: str | None = None
    tools: dict[str, Any] = field(default_factory=dict)
    cut: tuple[str, str] | None = None
    keeps_unknown: bool = False
    differs: str = ""


def _object(required: Sequence[str] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


STR, INT, NUM = {"type": "string"}, {"type": "integer"}, {"type": "number"}
BOOL, ARR, OBJ = {"type": "boolean"}, {"type": "array"}, {"type": "object"}
NULLABLE = {"anyOf": [STR, {"type": "null"}]}
UNIT = {"type": "string", "enum": ["celsius", "fahrenheit"]}
# As SGLang's: without a type, and with arguments that the schema does not name.
PLACES = {
    "get_weather": {"properties": {"location": STR, "unit": UNIT}, "required": ["location"]},
    "search": {"properties": {"query": STR}, "required": ["query"]},
}
CITIES = {"get_weather": _object(["city"], city=STR), "get_sights": _object(["city"], city=STR)}
DATED = {"get_weather": _object(["city", "date"], city=STR, date=STR)}
TODOS = {"todo_write": _object(["todos"], todos=ARR)}
DECIDE = {"decide": _object(["decision", "content"], decision=STR, content=STR)}
DOCS = {"search_docs": _object(["title"], title={"type": "array", "items": STR})}
V32 = {
    "search": _object(["query"], query=STR, topn=INT, source={"type": "string", "enum": ["web"]}),
    "spot": _object(["city"], city=STR),
    "get_date": _object(),
    "write_note": _object(payload=OBJ),
}
CODER = {
    "weather": _object(["location"], location=STR, unit=UNIT, days=INT),
    "sql": _object(query=STR, dry_run=BOOL),
    "todo": _object(todos={"type": "array", "items": _object(content=STR, status=STR)}),
}
FILES = {
    "ReadFile": _object(["path"], path=STR),
    "get_weather": _object(["city"], city=STR, unit=STR),
    "list-files": _object(["path"], path=STR),
}
AGENT = {
    "Read": _object(["file_path"], file_path=STR, offset=NUM),
    "Write": _object(["file_path", "content"], file_path=STR, content=STR),
    "Glob": _object(["pattern"], pattern=STR, path=STR),
    "Grep": _object(["pattern"], pattern=STR, path=STR, output_mode=STR),
    "LS": _object(["path"], path=STR, ignore=ARR),
    "Ping": _object(),
}
EITHER = {
    "locate": {
        "type": "object",
        "anyOf": [
            {"properties": {"city": STR}, "required": ["city"]},
            {"properties": {"zip": STR}, "required": ["zip"]},
        ],
    },
    "query": _object(["q"], q=STR),
}
STRICT = {
    "delete": _object(["action"], action={"const": "delete"}),
    "dispatch": {"type": "object", "additionalProperties": STR},
}
MINIMAX = {
    "nullable": _object(["args"], args=NULLABLE),
    "info": _object(short=BOOL),
    "write": _object(content=STR),
    "data": _object(data={"anyOf": [_object(key=STR), {"type": "null"}]}),
    "items": _object(items=ARR),
}
READ = {"read_file": _object(files=ARR)}
HARMONY = {"get_weather": _object(location=STR, unit=STR), "get_temp": _object(location=STR)}

P, G, K, Q = "parser", "glm47", "kimik2", "qwen3_coder"
