"""One turn of a conversation: its prompt, the grammar of its answer, and the parsing of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from sapwood.frontends.serving.generate import Choice, generate
from sapwood.frontends.serving.services import Services
from sapwood.frontends.serving.tools import ToolUse
from sapwood.schema.grammar import Thinking
from sapwood.schema.media_source import MediaSource
from sapwood.schema.output import Finish
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.thinking import ThinkingBudget
from sapwood.schema.unsupported import refuse
from sapwood.text.absent import AbsentTokenizer, refuse_text
from sapwood.text.answer import AnswerShape
from sapwood.text.events import Answer, AnswerBuilder, Event, Reasoning
from sapwood.text.generation import TextChunk, TextRequest
from sapwood.text.reasoning.format import Shown
from sapwood.text.template import ChatTemplate, Message
from sapwood.text.tool_prompt import spelled_out
from sapwood.text.tools.format import ToolSet
from sapwood.text.tools.json_array import JsonArray

_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates turn thinking on and off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A client's request for the next turn, whatever the dialect.

    media              pictures and videos, in the order in which the messages show them
    options            further variables of the chat template
    goes_on            whether the model continues the last message, which is the assistant's
    goes_on_unasked    whether `goes_on` is the dialect's rule instead of the client's wish
    takes_apart        whether thinking is separated from the answer
    streams_reasoning  whether a stream sends thinking as it comes, or all of it at its end
    insists_on_thinking  whether `thinks` is an error for a model that cannot think
    thinks             whether the model should think; None: as it usually does
    effort             how much the model should think, in the template's own words
    thinking_budget    tokens of thinking at most
    thinking_field     name of the request's field for thinks and effort, for errors
    budget_field       name of the request's field for thinking_budget, for errors
    """

    messages: Sequence[Message]
    media: Sequence[MediaSource] = ()
    tools: ToolUse = field(default_factory=ToolUse)
    documents: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    goes_on: bool = False
    goes_on_unasked: bool = False
    takes_apart: bool = True
    streams_reasoning: bool = True
    thinks: bool | None = None
    insists_on_thinking: bool = True
    effort: str | None = None
    thinking_budget: int | None = None
    thinking_field: str = "reasoning_effort"
    budget_field: str = "thinking_budget"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A conversation made ready for the engine; special tokens are in the prompt.

    media            pictures and videos, whose markers stand in the prompt
    tells_cut_calls  whether a call that the token limit cuts off is told as far as it came, as in
                     OpenAI's dialect; else its text becomes content
    """

    prompt: str
    sampling: SamplingParams
    shape: AnswerShape
    streams_reasoning: bool = True
    tells_cut_calls: bool = False
    media: tuple[MediaSource, ...] = ()

    def sample(self) -> TurnSample:
        return TurnSample(self)


class TurnSample:
    """One sample of a turn's answer as it comes."""

    def __init__(self, turn: Turn) -> None:
        self._parser = turn.shape.parser()
        self._holds_reasoning = not turn.streams_reasoning
        self._tells_cut_calls = turn.tells_cut_calls
        self._held: list[Event] = []
        self._builder = AnswerBuilder()
        self._num_reasoning_tokens = 0
        self._num_undecided_tokens = 0
        self._separates = turn.shape.reasoning is not None

    def add(self, chunk: TextChunk) -> list[Event]:
        """The new events in a chunk. The chunk with a finish brings everything that was held."""
        was_thinking = self._parser.is_thinking
        events = self._parser.feed(chunk.text)
        if chunk.finish is not None:
            is_cut = self._tells_cut_calls and chunk.finish.kind != "stop"
            events += self._parser.finish(is_cut=is_cut)
        # The tokens of a tag are counted as soon as the tag is recognised.
        self._num_undecided_tokens += len(chunk.token_ids)
        is_reasoning = any(isinstance(event, Reasoning) for event in events)
        if was_thinking or self._parser.is_thinking or is_reasoning:
            self._num_reasoning_tokens += self._num_undecided_tokens
            self._num_undecided_tokens = 0
        elif events:
            self._num_undecided_tokens = 0
        for event in events:
            self._builder.add(event)
        return self._in_time(events, is_last=chunk.finish is not None)

    @property
    def answer(self) -> Answer:
        return self._builder.built()

    @property
    def num_reasoning_tokens(self) -> int | None:
        """Tokens of thinking, tags included; None if thinking is not separated."""
        return self._num_reasoning_tokens if self._separates else None

    def finish_reason(self, finish: Finish | None) -> str | None:
        """Why the sample ended, in OpenAI's words."""
        if finish is None:
            return None
        is_call = finish.kind == "stop" and self._builder.num_calls > 0
        return "tool_calls" if is_call else finish.kind

    def _in_time(self, events: list[Event], *, is_last: bool) -> list[Event]:
        if not self._holds_reasoning:
            return events
        self._held += [event for event in events if isinstance(event, Reasoning)]
        others: list[Event] = [event for event in events if not isinstance(event, Reasoning)]
        if not self._held or (self._parser.is_thinking and not is_last):
            return others
        text = "".join(event.source for event in self._held)
        self._held = []
        return [Reasoning(text), *others]


async def collect_turn(
    services: Services, request: TextRequest, turn: Turn
) -> list[tuple[Choice, TurnSample]]:
    """The finished samples of the turn. Raises the errors of `generate`."""
    samples = [(Choice(), turn.sample()) for _ in range(request.n)]
    async with aclosing(generate(services, [request], keeps_logprobs=True)) as chunks:
        async for _, chunk in chunks:
            choice, sample = samples[chunk.index]
            choice.add(chunk)
            sample.add(chunk)
            choice.num_reasoning_tokens = sample.num_reasoning_tokens
    return samples


def plan_turn(
    services: Services, asked: Conversation, sampling: SamplingParams, *, instead: str
) -> Turn:
    """
    sampling  what the request says; what its tools and its thinking need is added
    instead   what a client may do if the model has no chat template
    Raises    InvalidRequest or UnsupportedFeature that names the field
    """
    services.check_task("tokens")
    if isinstance(services.tokenizer, AbsentTokenizer):
        refuse_text("a chat", param="messages")
    if services.template is None:
        raise UnsupportedFeature(
            f"this model has no chat template; {instead}, or start the server with --chat-template",
            param="messages",
        )
    options = _template_options(services, services.template, asked)
    tools = [tool.definition for tool in asked.tools.offered]
    if services.formats.tells_tools_in_text:
        messages = spelled_out(
            asked.messages,
            tools,
            in_system=services.template.places.system,
            parallel=asked.tools.parallel,
        )
        asked, tools = replace(asked, messages=messages), []
    prompt = _rendered(services, services.template, asked, tools, options)
    return _turn(services, asked, sampling, prompt)


def _turn(services: Services, asked: Conversation, sampling: SamplingParams, prompt: str) -> Turn:
    formats, use = services.formats, asked.tools
    special = services.tokenizer.special_token_texts
    calls = formats.calls if use.offered else None
    grammar = use.grammar(calls, special, sampling.grammar)
    reasoning = formats.reasoning
    shown = Shown.CLOSED
    if reasoning is not None:
        shown = reasoning.shown_by(prompt, prefix=_prefix(asked))
        if grammar is not None and shown is not Shown.CLOSED:
            thinking = Thinking(
                begin=reasoning.opens, end=reasoning.closes, is_open=shown is Shown.OPEN
            )
            grammar = msgspec.structs.replace(grammar, thinking=thinking)
    # A grammar applies from the first token on unless the answer opens its thinking. So with a
    # grammar an answer without tags is no thinking, even if the format would take it for that.
    thinks_untold = (
        shown is Shown.NOTHING and grammar is None and reasoning is not None and reasoning.is_forced
    )
    shape = AnswerShape(
        reasoning=reasoning if asked.takes_apart else None,
        is_thinking=shown is Shown.OPEN or thinks_untold,
        calls=JsonArray(formats.calls) if use.is_forced else calls,
        tools=ToolSet(
            parameters={tool.name: tool.schema for tool in use.offered},
            keeps_unknown=formats.keeps_unknown,
            max_calls=None if use.parallel else 1,
            only_opened=grammar is not None and not use.is_forced,
        ),
    )
    changes: dict[str, Any] = {"grammar": grammar}
    if asked.thinking_budget is not None and shown is not Shown.CLOSED:
        changes["thinking_budget"] = _budget(
            services, asked.thinking_budget, shown, thinks_untold=thinks_untold
        )
    if shape.tags & special:
        changes["skip_special_tokens"] = False
    return Turn(
        prompt=prompt,
        sampling=msgspec.structs.replace(sampling, **changes),
        shape=shape,
        streams_reasoning=asked.streams_reasoning,
        media=tuple(asked.media),
    )


def _rendered(
    services: Services,
    template: ChatTemplate,
    asked: Conversation,
    tools: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> str:
    try:
        return template.render(
            asked.messages,
            add_generation_prompt=asked.add_generation_prompt and not asked.goes_on_unasked,
            continue_final_message=asked.goes_on,
            tools=tools or None,
            documents=list(asked.documents) or None,
            markers=services.media_markers if asked.media else None,
            **options,
        )
    except InvalidRequest as error:
        if error.param != "continue_final_message" or not asked.goes_on_unasked:
            raise
        raise InvalidRequest(
            "the last of messages is the assistant's, but the chat template of this model leaves "
            "out its end, so that the model cannot go on with it; end with a message of the user",
            param="messages",
        ) from error


def _template_options(
    services: Services, template: ChatTemplate, asked: Conversation
) -> dict[str, Any]:
    """The template's variables; those that control thinking are set as the client wants."""
    options = dict(asked.options)
    thinks = asked.thinks
    has_reasoning = services.formats.reasoning is not None
    if asked.effort is not None:
        if "reasoning_effort" in template.variables and asked.effort != "none":
            options.setdefault("reasoning_effort", asked.effort)
        elif thinks is None:
            thinks = asked.effort != "none"
    switches = [name for name in _SWITCHES if name in template.variables]
    if thinks is not None:
        for name in switches:
            options.setdefault(name, thinks)
        # How hard a model thinks that does not think makes no difference.
        insists = asked.thinks is not None and asked.insists_on_thinking
        if insists and thinks and not switches and not has_reasoning:
            refuse(
                UnsupportedFeature(
                    f"{asked.thinking_field} asks for thinking, but this model does not think, as "
                    "far as its chat template and the server's --reasoning-parser show; leave it "
                    "out",
                    param=asked.thinking_field,
                )
            )
        if not thinks and not switches and has_reasoning:
            refuse(
                UnsupportedFeature(
                    f"{asked.thinking_field} asks for no thinking, but the chat template of this "
                    "model has no switch that turns it off; leave it out",
                    param=asked.thinking_field,
                )
            )
    if asked.thinking_budget is not None and not has_reasoning:
        refuse(
            UnsupportedFeature(
                f"{asked.budget_field} needs a model whose thinking the server can see; start it "
                "with --reasoning-parser",
                param=asked.budget_field,
            )
        )
    return options


def _prefix(asked: Conversation) -> str:
    """The text of the unfinished answer that the model continues; "" if it begins a new one."""
    if not asked.goes_on or not asked.messages:
        return ""
    content = asked.messages[-1].get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))


def _budget(
    services: Services, max_tokens: int, shown: Shown, *, thinks_untold: bool
) -> ThinkingBudget:
    """thinks_untold: the thinking is open, although the prompt does not show so."""
    reasoning = services.formats.reasoning
    assert reasoning is not None
    # In Harmony's format thinking is open from the start, but the answer still writes its header.
    is_open = shown is Shown.OPEN and reasoning.tool_format is None
    return ThinkingBudget(
        max_tokens=max_tokens,
        begin=_ids(services, reasoning.opens),
        end=_ids(services, reasoning.ends),
        forced=_ids(services, reasoning.forced_close),
        is_open=is_open or thinks_untold,
    )


def _ids(services: Services, text: str) -> tuple[int, ...]:
    return tuple(services.tokenizer.encode(text, add_special_tokens=False))
