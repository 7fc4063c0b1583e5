"""Ollama's requests. Source: its API reference. A null counts as absent."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sapwood.schema.fields import Count, FieldTable, Int64, NotOffered, PenaltyWindow


class OllamaRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The common fields of chat and generate.

    format      "json" for any JSON object, or a JSON Schema that the answer must match
    think       whether to think, or how much; left out: as the model does
    logprobs    tell how likely each token was; top_logprobs: and that many of the likeliest ones
    keep_alive  has no effect, since the model stays loaded as long as the server runs; 0 in a
                request without a prompt asks to unload the model, and is refused
    """

    model: str = ""
    stream: bool = True
    options: dict[str, Any] = {}
    format: str | dict[str, Any] | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    keep_alive: float | str | None = None
    logprobs: bool = False
    top_logprobs: Count = 0


class OllamaChatRequest(OllamaRequest, frozen=True, kw_only=True):
    """POST /api/chat. A request without messages only asks whether the model is loaded.

    tools  functions that the client runs
    """

    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] = []


class OllamaGenerateRequest(OllamaRequest, frozen=True, kw_only=True):
    """POST /api/generate. A request without a prompt only asks whether the model is loaded.

    system  the system message, for the chat template
    raw     take the prompt as it is, without the chat template
    images  pictures in base64, before the prompt; with raw, the prompt has the model's marker for
            each
    """

    prompt: str = ""
    system: str = ""
    raw: bool = False
    images: list[str] = []


class OllamaShowRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /api/show. The field `name` is an older word for `model`."""

    model: str = ""
    name: str = ""


class OllamaEmbedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /api/embed.

    input       a text or several; an empty list only asks whether the model is loaded
    dimensions  length to which embeddings are cut; 0: not cut
    keep_alive  has no effect, since the model stays loaded as long as the server runs
    """

    model: str = ""
    input: str | list[str]
    dimensions: Count | None = None
    options: dict[str, Any] = {}
    keep_alive: float | str | None = None


class OllamaEmbeddingsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /api/embeddings. Without a prompt it only asks whether the model is loaded."""

    model: str = ""
    prompt: str = ""
    options: dict[str, Any] = {}
    keep_alive: float | str | None = None


class OllamaPullRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /api/pull. The field `name` is an older word for `model`."""

    model: str = ""
    name: str = ""
    stream: bool = True


class OptionFields(msgspec.Struct, frozen=True, kw_only=True):
    """`options`. An absent one has the model's own default, else Ollama's (sampling.py).

    num_predict     output tokens at most; -1 and -2: as many as the context leaves
    repeat_penalty  SamplingParams's repetition_penalty
    top_k           0 and less: all tokens
    repeat_last_n   penalties count that many of the last tokens; 0: none, -1: all
    seed            -1: random
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    seed: int | None = None
    num_predict: Int64 = -1
    repeat_last_n: PenaltyWindow | None = None
    stop: str | list[str] = []
    repeat_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A message. The arguments of a call are an object; tool_name names the tool of a result.

    images  pictures in base64, which come before the content
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    images: list[str] = []
    thinking: str | None = None
    tool_calls: list[dict[str, Any]] = []
    tool_name: str | None = None
    tool_call_id: str | None = None


_NOT_SHORTENED = NotOffered(why="a prompt that is too long is refused, not cut", idle=(True, False))

_NOT_OFFERED: dict[str, NotOffered] = {
    "_debug_render_only": NotOffered(why="the prompt is not told"),
    "shift": _NOT_SHORTENED,
    "truncate": _NOT_SHORTENED,
}
_NO_PICTURES = NotOffered(why="answers are texts", idle=(0,))

CHAT_FIELDS = FieldTable(
    title="POST /api/chat", shape=OllamaChatRequest, not_offered=_NOT_OFFERED, coerces=False
)

GENERATE_FIELDS = FieldTable(
    title="POST /api/generate",
    shape=OllamaGenerateRequest,
    not_offered={
        **_NOT_OFFERED,
        "context": NotOffered(why="/api/chat takes the conversation"),
        "height": _NO_PICTURES,
        "steps": _NO_PICTURES,
        "suffix": NotOffered(why="the model only goes on with a text"),
        "template": NotOffered(why="the server has one; raw takes a prompt as it is"),
        "width": _NO_PICTURES,
    },
    coerces=False,
)

_MODELFILE = NotOffered(why="there is no Modelfile whose settings it would replace")

SHOW_FIELDS = FieldTable(
    title="POST /api/show",
    shape=OllamaShowRequest,
    changes_nothing={"verbose": "the answer has all there is"},
    not_offered={"options": _MODELFILE, "system": _MODELFILE, "template": _MODELFILE},
    coerces=False,
)

MESSAGE_FIELDS = FieldTable(
    title="messages[] of /api/chat",
    shape=Message,
    coerces=False,
)

EMBED_FIELDS = FieldTable(
    title="POST /api/embed",
    shape=OllamaEmbedRequest,
    not_offered={"truncate": _NOT_SHORTENED},
    left_out={"dimensions": (0,)},
    coerces=False,
)

EMBEDDINGS_FIELDS = FieldTable(
    title="POST /api/embeddings", shape=OllamaEmbeddingsRequest, coerces=False
)

_NO_REGISTRY = "nothing is fetched: the served model is there"

PULL_FIELDS = FieldTable(
    title="POST /api/pull",
    shape=OllamaPullRequest,
    changes_nothing=dict.fromkeys(("insecure", "username", "password"), _NO_REGISTRY),
    coerces=False,
)

_LAYOUT = "the server's own options say how the model lies in memory"
_MIROSTAT = "a parameter of mirostat, which another field turns on"

OPTION_FIELDS = FieldTable(
    title="options of /api/chat, /api/generate, /api/embed and /api/embeddings",
    shape=OptionFields,
    changes_nothing={
        "f16_kv": _LAYOUT,
        "low_vram": _LAYOUT,
        "main_gpu": _LAYOUT,
        "mirostat_eta": _MIROSTAT,
        "mirostat_tau": _MIROSTAT,
        "num_batch": _LAYOUT,
        "num_ctx": "the server's --context-length holds; a longer prompt is refused",
        "num_gpu": _LAYOUT,
        "num_keep": "a context that is full ends the answer",
        "num_thread": _LAYOUT,
        "numa": _LAYOUT,
        "penalize_newline": "Ollama's newer versions do not read it either",
        "use_mlock": _LAYOUT,
        "use_mmap": _LAYOUT,
    },
    not_offered={
        "embedding_only": NotOffered(why="the server generates"),
        "logits_all": NotOffered(why="logprobs and top_logprobs tell what there is"),
        "mirostat": NotOffered(why="there is no such sampler", idle=(0,)),
        "tfs_z": NotOffered(why="there is no such sampler", idle=(1.0,)),
        "typical_p": NotOffered(why="there is no such sampler", idle=(1.0,)),
        "vocab_only": NotOffered(why="the whole model is loaded"),
    },
    coerces=False,
)
