"""The tools of a request, in the form that OpenAI's API has and templates take."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.schema.fields import FieldTable, NotOffered, parse
from sapwood.schema.grammar import Grammar, as_format, structural_tag
from sapwood.schema.limits import TOOL_NAME, TOOLS
from sapwood.schema.tool_grammar import tool_call_list
from sapwood.schema.unsupported import refuse
from sapwood.text.tools.format import CallStructure, ToolFormat

Choice = Literal["auto", "none", "required"]

_NAME = re.compile(rf"[A-Za-z0-9_.:/\-]{{1,{TOOL_NAME.most}}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One function that the client runs.

    strict  whether the model's arguments must match `parameters`
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    @property
    def definition(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        # Templates iterate over the properties without testing whether there are any.
        function["parameters"] = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}

    @property
    def schema(self) -> Mapping[str, Any]:
        """The schema of the arguments; its type is object, whatever the client's schema says."""
        return {"type": "object", **(self.parameters or {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """
    choice    auto: the model calls or answers; required: it calls; none: it answers
    only      the one tool that it must call, with "required"
    parallel  it may call several at once
    """

    tools: Sequence[Tool] = ()
    choice: Choice = "auto"
    only: str | None = None
    parallel: bool = True

    @property
    def offered(self) -> Sequence[Tool]:
        return () if self.choice == "none" else self.tools

    @property
    def is_forced(self) -> bool:
        return bool(self.tools) and self.choice == "required"

    def grammar(
        self, calls: ToolFormat | None, special_texts: frozenset[str], content: Grammar | None
    ) -> Grammar | None:
        """The grammar that the output must match; None if it need not match any.

        calls          the format of the model's tool calls
        special_texts  the tokenizer's special tokens
        content        the grammar of an answer without calls; None: anything
        Raises         UnsupportedFeature if no grammar can require both
        """
        if self.is_forced:
            chosen = [tool for tool in self.tools if self.only in (None, tool.name)]
            return tool_call_list(
                [(tool.name, tool.schema) for tool in chosen],
                at_most_one=self.only is not None or not self.parallel,
            )
        if content is not None and self.offered:
            return self._calls_or(content, calls, special_texts)
        if not any(tool.strict for tool in self.offered) or calls is None:
            return content
        structures = self._structures(calls, special_texts, asked_by="strict")
        triggers = list(dict.fromkeys(spelled.trigger for spelled, _ in structures))
        written = [
            {"begin": spelled.begin, "schema": schema, "end": spelled.end}
            for spelled, schema in structures
        ]
        return structural_tag({"structures": written, "triggers": triggers}, param="tools")

    def _calls_or(
        self, content: Grammar, calls: ToolFormat | None, special_texts: frozenset[str]
    ) -> Grammar:
        """A grammar of either the content alone, or of one call or more."""
        structures = self._structures(calls, special_texts, asked_by="response_format or its like")
        tags = [
            {
                "type": "tag",
                "begin": spelled.begin,
                "content": {"type": "json_schema", "json_schema": schema},
                "end": spelled.end,
            }
            for spelled, schema in structures
        ]
        called = {
            "type": "tags_with_separator",
            "tags": tags,
            "separator": "\n",
            "at_least_one": True,
            "stop_after_first": not self.parallel,
        }
        either = [as_format(content, param="tools"), called]
        return structural_tag({"format": {"type": "or", "elements": either}}, param="tools")

    def _structures(
        self, calls: ToolFormat | None, special_texts: frozenset[str], *, asked_by: str
    ) -> list[tuple[CallStructure, Mapping[str, Any]]]:
        """For each tool: (the text around a call's arguments, schema of the arguments)."""
        found: list[tuple[CallStructure, Mapping[str, Any]]] = []
        for tool in self.offered:
            spelled = calls.structure(tool.name) if calls is not None else None
            # A grammar over text does not see special tokens.
            if spelled is None or any(text in spelled.begin for text in special_texts):
                those = "this model's" if calls is None else f"those of the {calls.name} parser"
                raise UnsupportedFeature(
                    f"tools with {asked_by} need calls that a grammar can follow, which {those} "
                    f'are not; use tool_choice "required" or a named tool, or leave {asked_by} out',
                    param="tools",
                )
            found.append((spelled, tool.schema if tool.strict else {"type": "object"}))
        return found


class FunctionFields(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False


class ToolFields(msgspec.Struct, frozen=True, kw_only=True):
    function: dict[str, Any]
    type: str = "function"


TOOL_FIELDS = FieldTable(
    title="tools[] of /v1/chat/completions and /api/chat",
    shape=ToolFields,
    changes_nothing={"cache_control": "prefixes are always cached"},
    not_offered={"defer_loading": NotOffered(why="the model sees all tools")},
)
FUNCTION_FIELDS = FieldTable(
    title="tools[].function of /v1/chat/completions and /api/chat",
    shape=FunctionFields,
    not_offered={"defer_loading": NotOffered(why="the model sees all tools")},
)


def checked_tools(tools: Sequence[Tool], *, where: str = "tools") -> tuple[Tool, ...]:
    """The tools. Raises InvalidRequest for a name that no call can have, or that comes twice."""
    TOOLS.check(len(tools), where)
    seen: set[str] = set()
    for position, tool in enumerate(tools):
        if not _NAME.fullmatch(tool.name):
            raise InvalidRequest(
                f"{where}[{position}] is named {tool.name[:140]!r}, but a name has 1 to "
                f"{TOOL_NAME.most} letters, digits and _ - . : /",
                param=where,
            )
        if tool.name in seen:
            raise InvalidRequest(
                f"{where} has two tools named {tool.name!r}; give each a name of its own",
                param=where,
            )
        seen.add(tool.name)
    return tuple(tools)


def openai_tools(given: Sequence[Mapping[str, Any]], where: str = "tools") -> tuple[Tool, ...]:
    """The tools of the field `tools`, in the form of OpenAI's chat completions."""
    tools = [_function(tool, f"{where}[{i}]") for i, tool in enumerate(given)]
    return checked_tools([tool for tool in tools if tool is not None])


def openai_tool_use(
    given: Sequence[Mapping[str, Any]],
    choice: str | Mapping[str, Any] | None,
    parallel: bool | None,
) -> ToolUse:
    """The fields tools, tool_choice and parallel_tool_calls of OpenAI's chat completions."""
    tools = openai_tools(given)
    parallel = True if parallel is None else parallel
    if choice is None:
        return ToolUse(tools=tools, parallel=parallel)
    if isinstance(choice, str):
        if choice not in ("auto", "none", "required"):
            raise InvalidRequest(
                f'tool_choice is {choice[:80]!r} but must be "auto", "none", "required" or '
                '{"type": "function", "function": {"name": …}}',
                param="tool_choice",
            )
        if choice == "required" and not tools:
            raise _no_tools()
        return ToolUse(tools=tools, choice=choice, parallel=parallel)  # type: ignore[arg-type]
    if choice.get("type") == "allowed_tools":
        return _allowed_tools(tools, choice.get("allowed_tools"), parallel=parallel)
    name = _function_name(choice)
    if name is None:
        refuse(
            UnsupportedFeature(
                'tool_choice must be a word, {"type": "function", "function": {"name": …}} or '
                '{"type": "allowed_tools", …}',
                param="tool_choice",
            )
        )
        return ToolUse(tools=tools, parallel=parallel)
    return named_tool(tools, name, parallel=parallel)


def _function_name(chosen: object) -> str | None:
    """The name in {"type": "function", "function": {"name": …}}; None for anything else."""
    if not isinstance(chosen, Mapping) or chosen.get("type", "function") != "function":
        return None
    function = chosen.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def _allowed_tools(tools: Sequence[Tool], given: object, *, parallel: bool) -> ToolUse:
    """The tools of OpenAI's tool_choice "allowed_tools"; the model does not see the others."""
    where = "tool_choice.allowed_tools"
    mode = given.get("mode") if isinstance(given, Mapping) else None
    listed = given.get("tools") if isinstance(given, Mapping) else None
    if mode not in ("auto", "required") or not isinstance(listed, list):
        raise InvalidRequest(
            f'{where} must have a mode, "auto" or "required", and a list of tools', param=where
        )
    names = [_function_name(one) for one in listed]
    known = {tool.name for tool in tools}
    for position, name in enumerate(names):
        if name not in known:
            raise InvalidRequest(
                f"{where}.tools[{position}] is no function that tools has", param=where
            )
    allowed = tuple(tool for tool in tools if tool.name in set(names))
    if mode == "required" and not allowed:
        raise _no_tools()
    return ToolUse(tools=allowed, choice=mode, parallel=parallel)


def named_tool(tools: Sequence[Tool], name: str, *, parallel: bool) -> ToolUse:
    if not tools:
        raise _no_tools()
    if all(tool.name != name for tool in tools):
        known = ", ".join(tool.name for tool in tools)
        raise InvalidRequest(
            f"tool_choice names {name[:140]!r}, but tools has only: {known}", param="tool_choice"
        )
    return ToolUse(tools=tools, choice="required", only=name, parallel=parallel)


def _no_tools() -> InvalidRequest:
    return InvalidRequest("tool_choice needs tools to choose from", param="tool_choice")


def _function(given: Any, where: str) -> Tool | None:
    """The tool; None if it is one of those that the server leaves out where it only warns."""
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{where} must be an object", param=where)
    kind = given.get("type", "function")
    if kind != "function":
        refuse(
            UnsupportedFeature(
                f"{where} is of type {str(kind)[:40]!r}, but this server takes only tools of type "
                "'function', which the client runs",
                param=where,
            )
        )
        return None
    function = parse(given, TOOL_FIELDS, where=where).function
    fields = parse(function, FUNCTION_FIELDS, where=f"{where}.function")
    return Tool(
        name=fields.name,
        description=fields.description,
        parameters=fields.parameters,
        strict=fields.strict,
    )
