"""All tables of fields, by dialect, for the documentation and for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import orjson

from sapwood.frontends.anthropic import protocol as anthropic
from sapwood.frontends.batches import lines
from sapwood.frontends.batches import protocol as batches
from sapwood.frontends.hosts import routes as hosts
from sapwood.frontends.images import loras
from sapwood.frontends.images import protocol as images
from sapwood.frontends.native import (
    classify,
    encode,
    parsing,
    rerank,
    score,
    sessions,
    settings,
    tier_routes,
    tokens,
    weights,
)
from sapwood.frontends.native import protocol as native
from sapwood.frontends.observability import controls
from sapwood.frontends.ollama import protocol as ollama
from sapwood.frontends.openai import embeddings
from sapwood.frontends.openai import protocol as openai
from sapwood.frontends.responses import protocol as responses
from sapwood.frontends.serving import tools
from sapwood.frontends.videos import protocol as videos
from sapwood.schema.fields import FieldTable

Tables = Sequence[FieldTable[Any]]

FIELD_TABLES: Mapping[str, Tables] = {
    "Pictures": (
        images.GENERATION_FIELDS,
        images.EDIT_FIELDS,
        videos.VIDEO_FIELDS,
        videos.REMIX_FIELDS,
        loras.SET_LORA_FIELDS,
        loras.MERGE_LORA_FIELDS,
        loras.UNMERGE_LORA_FIELDS,
    ),
    "Native": (
        native.GENERATE_FIELDS,
        native.SAMPLING_FIELDS,
        native.SESSION_FIELDS,
        sessions.OPEN_SESSION_FIELDS,
        sessions.CLOSE_SESSION_FIELDS,
        native.LOAD_ADAPTER_FIELDS,
        native.LOAD_SENT_ADAPTER_FIELDS,
        native.UNLOAD_ADAPTER_FIELDS,
        encode.ENCODE_FIELDS,
        rerank.RERANK_FIELDS,
        score.SCORE_FIELDS,
        classify.CLASSIFY_FIELDS,
        tokens.TOKENIZE_FIELDS,
        tokens.DETOKENIZE_FIELDS,
        parsing.PARSE_CALL_FIELDS,
        parsing.SEPARATE_FIELDS,
        native.ABORT_FIELDS,
        controls.PROFILE_FIELDS,
        controls.LOGGING_FIELDS,
        controls.SLOW_DOWN_FIELDS,
        weights.FROM_DISK_FIELDS,
        weights.FROM_TENSOR_FIELDS,
        weights.INIT_GROUP_FIELDS,
        weights.FROM_GROUP_FIELDS,
        weights.FROM_IPC_FIELDS,
        weights.INIT_SEND_GROUP_FIELDS,
        weights.SEND_WEIGHTS_FIELDS,
        settings.SETTINGS_FIELDS,
        weights.DESTROY_GROUP_FIELDS,
        weights.VERSION_FIELDS,
        weights.READ_FIELDS,
        weights.CHECKER_FIELDS,
        weights.PAUSE_FIELDS,
        weights.MEMORY_FIELDS,
        tier_routes.ATTACH_FIELDS,
    ),
    "OpenAI: chat, completions, embeddings": (
        openai.CHAT_FIELDS,
        openai.MESSAGE_FIELDS,
        openai.PART_FIELDS,
        tools.TOOL_FIELDS,
        tools.FUNCTION_FIELDS,
        openai.COMPLETION_FIELDS,
        openai.STREAM_OPTIONS_FIELDS,
        openai.STRUCTURED_OUTPUTS_FIELDS,
        embeddings.EMBEDDINGS_FIELDS,
    ),
    "OpenAI: responses": (
        responses.REQUEST_FIELDS,
        responses.STREAM_OPTIONS_FIELDS,
        responses.TEXT_FIELDS,
        responses.REASONING_FIELDS,
        responses.MESSAGE_FIELDS,
        responses.CALL_FIELDS,
        responses.CALL_OUTPUT_FIELDS,
        responses.REASONING_ITEM_FIELDS,
        responses.PART_FIELDS,
        responses.TOOL_FIELDS,
    ),
    "OpenAI: batches": (
        batches.CREATE_FIELDS,
        batches.EXPIRY_FIELDS,
        lines.OPENAI_LINE_FIELDS,
        lines.NATIVE_LINE_FIELDS,
    ),
    "Anthropic": (
        anthropic.MESSAGES_FIELDS,
        anthropic.COUNT_FIELDS,
        anthropic.OUTPUT_FIELDS,
        anthropic.FORMAT_FIELDS,
        anthropic.THINKING_FIELDS,
        anthropic.CHOICE_FIELDS,
        anthropic.TURN_FIELDS,
        anthropic.TEXT_FIELDS,
        anthropic.THINKING_BLOCK_FIELDS,
        anthropic.REDACTED_FIELDS,
        anthropic.TOOL_USE_FIELDS,
        anthropic.TOOL_RESULT_FIELDS,
        anthropic.TOOL_FIELDS,
    ),
    "Ollama": (
        ollama.CHAT_FIELDS,
        ollama.GENERATE_FIELDS,
        ollama.OPTION_FIELDS,
        ollama.MESSAGE_FIELDS,
        ollama.EMBED_FIELDS,
        ollama.EMBEDDINGS_FIELDS,
        ollama.PULL_FIELDS,
        ollama.SHOW_FIELDS,
    ),
    "Cloud hosts": (hosts.VERTEX_FIELDS,),
}


def as_markdown(tables: Mapping[str, Tables] = FIELD_TABLES) -> str:
    """The tables as a part of a page."""
    parts: list[str] = []
    for dialect, of_dialect in tables.items():
        parts += [f"## {dialect}", ""]
        for table in of_dialect:
            parts += [f"### {table.title}", "", *_rows(table), ""]
    return "\n".join(parts)


def _rows(table: FieldTable[Any]) -> list[str]:
    """One row per outcome, with all fields that have it."""
    fields: dict[str, list[str]] = {}
    for one in msgspec.structs.fields(table.shape):
        idle = table.left_out.get(one.name, ())
        outcome = f"honoured; {_values(idle)}: as if left out" if idle else "honoured"
        fields.setdefault(outcome, []).append(f"`{one.encode_name}`{_default(one)}")
    for name, alias in table.aliases.items():
        but = f"; {_values(alias.idle)}: as if left out" if alias.idle else ""
        fields.setdefault(f"honoured, as another name of `{alias.of}`{but}", []).append(f"`{name}`")
    for name, why in table.changes_nothing.items():
        fields.setdefault(f"changes nothing: {why}", []).append(f"`{name}`")
    for name, asked in table.not_offered.items():
        accepted = f", but {_values(asked.idle)} is accepted" if asked.idle else ""
        fields.setdefault(f"not supported: {asked.why}{accepted}", []).append(f"`{name}`")
    rows = [f"| {', '.join(names)} | {outcome} |" for outcome, names in fields.items()]
    return ["| Fields | What becomes of them |", "|---|---|", *rows]


def _default(one: msgspec.structs.FieldInfo) -> str:
    if one.required:
        return " (required)"
    default = one.default if one.default_factory is msgspec.NODEFAULT else one.default_factory()
    return "" if default is None else f" ({orjson.dumps(default).decode()})"


def _values(values: Sequence[object]) -> str:
    return " or ".join(f"`{orjson.dumps(value).decode()}`" for value in values)
