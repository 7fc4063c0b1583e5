"""Services whose model thinks and calls tools, and clients that read them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import openai

from sapwood.text.formats import AnswerFormats
from sapwood.text.reasoning.registry import REASONING_FORMATS
from sapwood.text.template import ChatTemplate, template_source
from sapwood.text.tools.registry import TOOL_FORMATS

TEMPLATE = template_source("chatml-tools")
SHORT_TEMPLATE = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}."
"""For many tools: the scripted engine's context is small."""
THINKING_TEMPLATE = (
    TEMPLATE
    + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    + "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)


def formats(calls: str | None = None, reasoning: str | None = None, **others: Any) -> AnswerFormats:
    return AnswerFormats(
        calls=TOOL_FORMATS.get(calls)() if calls else None,
        reasoning=REASONING_FORMATS.get(reasoning) if reasoning else None,
        **others,
    )


def changes(
    calls: str | None = None, reasoning: str | None = None, **others: Any
) -> dict[str, Any]:
    """For `api_with`: a model of those formats."""
    template = ChatTemplate(THINKING_TEMPLATE if reasoning else TEMPLATE)
    return {"template": template, "formats": formats(calls, reasoning, **others)}


def without_place(source: str = "chatml", reasoning: str | None = None) -> dict[str, Any]:
    """For `api_with`: a model whose template has no place for tools, as "auto" takes it.

    source  the name of a built-in template, or jinja text
    """
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    template = ChatTemplate(template_source(source), special_tokens=special)
    parsers = {"tool_call_parser": "auto", "reasoning_parser": reasoning or "auto"}
    return {"template": template, "formats": AnswerFormats.of_model(template=template, **parsers)}


def tools_of(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in parameters.items()
    ]


def with_client(
    app: Any, use: Callable[[openai.AsyncOpenAI], Awaitable[dict[str, Any]]]
) -> dict[str, Any]:
    """What `use` makes of OpenAI's official client, connected to the application."""

    async def run() -> dict[str, Any]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            httpx.AsyncClient(transport=transport) as http,
            openai.AsyncOpenAI(
                base_url="http://test/v1", api_key="none", max_retries=0, http_client=http
            ) as client,
        ):
            return await use(client)

    return asyncio.run(run())


def read_whole(app: Any, **body: Any) -> dict[str, Any]:
    async def use(client: openai.AsyncOpenAI) -> dict[str, Any]:
        answer = await client.chat.completions.create(model="org/tiny", **body)
        choice = answer.choices[0]
        message = choice.message
        return {
            "content": message.content or "",
            "reasoning": getattr(message, "reasoning_content", None) or "",
            "calls": [
                (call.function.name, json.loads(call.function.arguments))
                for call in message.tool_calls or []
            ],
            "finish_reason": choice.finish_reason,
        }

    return with_client(app, use)


def read_stream(app: Any, **body: Any) -> dict[str, Any]:
    """The stream, put together as clients do it: by the calls' indices."""

    async def use(client: openai.AsyncOpenAI) -> dict[str, Any]:
        content, reasoning, finish_reason = "", "", None
        calls: dict[int, list[str]] = {}
        stream = await client.chat.completions.create(model="org/tiny", stream=True, **body)
        async for chunk in stream:
            choice = chunk.choices[0]
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            finish_reason = choice.finish_reason or finish_reason
            for call in choice.delta.tool_calls or []:
                if call.id:
                    assert call.index not in calls
                    calls[call.index] = [call.function.name, ""]
                calls[call.index][1] += call.function.arguments or ""
        return {
            "content": content,
            "reasoning": reasoning,
            "calls": [(name, json.loads(text)) for name, text in calls.values()],
            "finish_reason": finish_reason,
        }

    return with_client(app, use)
