"""Chat messages to one prompt, by the model's jinja template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sapwood.base.errors import ConfigError, InvalidRequest, UnsupportedFeature
from sapwood.schema.media_source import MediaKind
from sapwood.text.json_source import TooDeep, parsed
from sapwood.text.template_places import TemplatePlaces, places_of
from sapwood.text.template_traits import traits_of
from sapwood.text.tokenizer import Tokenizer

Message = Mapping[str, Any]

RESERVED_NAMES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
)
"""Names that `chat_template_kwargs` must not set: the request has fields of its own for them."""

SYSTEM_ROLES = ("system", "developer")

_ALIASES = {"llama-3-instruct": "llama-3", "gemma-it": "gemma", "vicuna_v1.1": "vicuna"}

OWN_TEMPLATES = {"DeepseekV32ForCausalLM": "deepseek-v3.2"}
"""Architectures whose checkpoints come with code instead of a template -> the built-in that writes
the same prompts."""

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

_ANY_SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
"""For templates that show tools only beside a system message, where the request has none."""

# The trailing space tells whether the template strips the content: then it is gone after rendering.
_CUT_HERE = "\ue000cut here\ue001 "

_RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""Exceptions that a template may raise on messages of an unexpected shape. A RecursionError comes
from a macro that calls itself for each level of nesting in a message."""


class ChatTemplate:
    """One model's chat template, compiled once; `render` may be called from several threads.

    Templates are written against the environment of transformers: jinja2 sandboxed, blocks trimmed,
    `break` and `continue`, `raise_exception`, `strftime_now`, `{% generation %}` blocks, and a
    `tojson` that does not escape HTML.

    source          jinja text
    tool_source     jinja text for requests with tools, where a model has another one for them
    special_tokens  variables such as bos_token
    now             the clock that `strftime_now` reads

    Attributes: `source` is the jinja text of all templates, `variables` the names that they take.

    Raises ConfigError, with the line, if a source is not valid jinja.
    """

    def __init__(
        self,
        source: str,
        *,
        tool_source: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        environment = _environment(now)
        self.source = source if tool_source is None else f"{tool_source}\n{source}"
        self._plain = _Compiled(environment, source)
        self._with_tools = self._plain
        if tool_source is not None:
            self._with_tools = _Compiled(environment, tool_source)
        self._special_tokens = dict(special_tokens or {})
        self.variables = self._plain.traits.variables | self._with_tools.traits.variables

    @cached_property
    def places(self) -> TemplatePlaces:
        """What the template has a place for."""

        def render(messages: list[Message], tools: list[Message] | None) -> str:
            template = self._with_tools if tools else self._plain
            variables = {
                **self._special_tokens,
                "messages": [_prepared(message, template) for message in messages],
                "tools": tools,
                "documents": None,
                "add_generation_prompt": True,
            }
            return template.render(variables)

        mentions_tools = "tools" in self._with_tools.traits.variables
        return places_of(render, mentions_tools=mentions_tools)

    @classmethod
    def of_model(
        cls,
        tokenizer: Tokenizer,
        *,
        override: str | None = None,
        name: str | None = None,
        architectures: Sequence[str] = (),
    ) -> ChatTemplate | None:
        """The template of `--chat-template`, or else the tokenizer's own, or else that of the
        architecture; None if there is none.

        override  a built-in name, a file, or the jinja text itself
        name      which of the tokenizer's templates is its own; None: that named default
        Raises    ConfigError if the tokenizer has none of that name
        """
        own = tokenizer.chat_template if name is None else tokenizer.template_named(name)
        if override is None and own is None:
            override = next(
                (OWN_TEMPLATES[one] for one in architectures if one in OWN_TEMPLATES), None
            )
        if override is not None:
            return cls(template_source(override), special_tokens=tokenizer.special_tokens)
        if own is None:
            return None
        return cls(
            own,
            tool_source=tokenizer.chat_templates.get("tool_use"),
            special_tokens=tokenizer.special_tokens,
        )

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        markers: Mapping[MediaKind, str] | None = None,
        **kwargs: Any,
    ) -> str:
        """The messages as one prompt. It has special tokens: use add_special_tokens=False on it.

        messages                each with a role; content is a string or a list of parts
        add_generation_prompt   end with the beginning of the assistant's answer
        tools                   as in OpenAI's API: {"type": "function", "function": {…}}
        continue_final_message  leave the last message open, so that the model goes on with it
        markers                 kind of media -> the text that stands for one, for templates that
                                write only texts
        kwargs                  further variables (chat_template_kwargs)

        Raises InvalidRequest with the template's own words if the template raises an error, and
        UnsupportedFeature if the template has no place for a part of the request.
        """
        check_messages(messages)
        clash = RESERVED_NAMES & kwargs.keys()
        if clash:
            raise InvalidRequest(
                f"chat_template_kwargs must not set {', '.join(sorted(clash))}; "
                "the request has fields for that",
                param="chat_template_kwargs",
            )
        template = self._with_tools if tools else self._plain
        if tools and not self.places.tools:
            raise UnsupportedFeature(
                "the chat template of this model has no place for tools; leave them out, or start "
                "the server with --tool-call-parser generic or with another --chat-template",
                param="tools",
            )
        if documents and "documents" not in template.traits.variables:
            raise UnsupportedFeature(
                "the chat template of this model has no place for documents; leave them out or "
                "start the server with a --chat-template that has",
                param="documents",
            )
        if tools and self.places.tools_need_system and messages[0]["role"] not in SYSTEM_ROLES:
            messages = [_ANY_SYSTEM, *messages]
        prepared = [_prepared(message, template, markers or {}) for message in messages]
        if continue_final_message:
            if add_generation_prompt:
                raise InvalidRequest(
                    "continue_final_message and add_generation_prompt exclude each other: one goes "
                    "on with the last message, the other begins a new one; set only one of them",
                    param="continue_final_message",
                )
            prepared[-1] = _marked(prepared[-1])
        prompt = template.render(
            {
                **self._special_tokens,
                **kwargs,
                "messages": prepared,
                "tools": None if tools is None else list(tools),
                "documents": None if documents is None else list(documents),
                "add_generation_prompt": add_generation_prompt,
            }
        )
        return _cut(prompt) if continue_final_message else prompt


class _Compiled:
    """One compiled template, and the form in which it expects messages."""

    def __init__(self, environment: jinja2.Environment, source: str) -> None:
        try:
            self.traits = traits_of(environment.parse(source))
            self.knows_developers = "developer" in source
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template is not valid jinja: line {error.lineno}: {error.message}; "
                "correct it or choose another with --chat-template"
            ) from error

    def render(self, variables: dict[str, Any]) -> str:
        try:
            return self._template.render(variables)
        except _RENDER_ERRORS as error:
            is_jinja = isinstance(error, jinja2.TemplateError)
            reason = str(error) if is_jinja else f"{type(error).__name__}: {error}"
            raise InvalidRequest(
                f"the chat template refuses these messages: {reason}", param="messages"
            ) from error


def built_in_names() -> list[str]:
    """The templates that come with sapwood."""
    files = resources.files("sapwood.text").joinpath("templates").iterdir()
    names = [file.name.removesuffix(".jinja") for file in files if file.name.endswith(".jinja")]
    return sorted([*names, *_ALIASES])


def template_source(choice: str) -> str:
    """The jinja text that `--chat-template` names: a built-in, a file, or the text itself."""
    if choice in built_in_names():
        file = f"{_ALIASES.get(choice, choice)}.jinja"
        return resources.files("sapwood.text").joinpath("templates", file).read_text("utf-8")
    if "{{" in choice or "{%" in choice:
        return choice
    path = Path(choice).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8")
    raise ConfigError(
        f"--chat-template {choice!r} is no file, no jinja text and no built-in; "
        f"built-in are {', '.join(built_in_names())}"
    )


class _GenerationBlocks(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks training targets, renders its inside."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it as an instance attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment(now: Callable[[], datetime]) -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"],
    )

    def strftime_now(format: str) -> str:  # noqa: A002 - templates may pass it by name
        return now().strftime(format)

    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise InvalidRequest("messages is empty; send at least one message", param="messages")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(
                f"messages[{position}] has no role; give it one, such as 'user'", param="messages"
            )


def _prepared(
    message: Message, template: _Compiled, markers: Mapping[MediaKind, str] = MappingProxyType({})
) -> dict[str, Any]:
    """A copy of the message in the form that this template expects."""
    # Templates test for a key; `content: null` would be rendered as the word None.
    prepared = {key: value for key, value in message.items() if value is not None}
    reasoning = next((prepared[name] for name in _REASONING_FIELDS if name in prepared), None)
    if reasoning is not None:
        prepared = {"thinking": reasoning, **prepared, "reasoning_content": reasoning}
    if prepared["role"] == "developer" and not template.knows_developers:
        # OpenAI's newer word for the system role.
        prepared["role"] = "system"
    content = prepared.get("content")
    if isinstance(content, list) and template.traits.content == "text":
        prepared["content"] = text_of_parts(content, markers)
    elif isinstance(content, str) and template.traits.content == "parts":
        prepared["content"] = [{"type": "text", "text": content}]
    if prepared.get("tool_calls") and not template.traits.arguments_as_text:
        prepared["tool_calls"] = [_with_parsed_arguments(call) for call in prepared["tool_calls"]]
    return prepared


def text_of_parts(parts: list[Any], markers: Mapping[MediaKind, str] = MappingProxyType({})) -> str:
    """The texts of the parts, joined by a space as SGLang does; or by line breaks as vLLM does, if
    there are pictures or videos among them, for which their markers stand."""
    texts: list[str] = []
    between = " "
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type") == "text":
            texts.append(str(part.get("text", "")))
        elif isinstance(part, Mapping) and part.get("type") in markers:
            texts.append(markers[part["type"]])
            between = "\n"
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UnsupportedFeature(
                f"the chat template of this model takes only text, but a message has a part of "
                f"type {kind!r}; leave it out or use a model that takes it",
                param="messages",
            )
    return between.join(texts)


def _with_parsed_arguments(call: Any) -> Any:
    """The tool call with its arguments as an object, which OpenAI's API sends as JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments, str):
        return call
    try:
        value = parsed(arguments)
    except TooDeep as error:
        raise InvalidRequest(
            f"the arguments of a tool call in messages are {error}; send them flatter",
            param="messages",
        ) from None
    except ValueError:
        # A model may have written broken JSON; the history is shown to it as it was.
        return call
    return {**call, "function": {**function, "arguments": value}}


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    """The message with a mark at the end of its text, where the prompt will be cut off."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _CUT_HERE}
    parts = list(content) if isinstance(content, list) else []
    for position in reversed(range(len(parts))):
        if isinstance(parts[position], dict) and "text" in parts[position]:
            parts[position] = {**parts[position], "text": parts[position]["text"] + _CUT_HERE}
            return {**message, "content": parts}
    raise InvalidRequest(
        "continue_final_message is set, but the last message has no text to go on with",
        param="continue_final_message",
    )


def _cut(prompt: str) -> str:
    position = prompt.rfind(_CUT_HERE.rstrip())
    if position < 0:
        raise InvalidRequest(
            "continue_final_message is set, but the chat template leaves out the end of the last "
            "message; begin a new message instead",
            param="continue_final_message",
        )
    kept = prompt[:position]
    return kept if prompt.startswith(_CUT_HERE, position) else kept.rstrip()
