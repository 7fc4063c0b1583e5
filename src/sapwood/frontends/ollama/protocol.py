"""Ollama's requests. Source: its API reference. A null counts as absent."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sapwood.frontends.common.fields import Count, Int64, Rules


class OllamaRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The common fields of chat and generate.

    format      "json" for any JSON object, or a JSON Schema that the answer must match
    think       whether to think, or how much; left out: as the model does
    keep_alive  has no effect, since the model stays loaded as long as the server runs; 0 in a
                request without a prompt asks to unload the model, and is refused
    """

    model: str = ""
    stream: bool = True
    options: dict[str, Any] = {}
    format: str | dict[str, Any] | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    keep_alive: float | str | None = None


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
    """

    prompt: str = ""
    system: str = ""
    raw: bool = False


class OllamaShowRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /api/show. The field `name` is an older word for `model`."""

    model: str = ""
    name: str = ""


class OptionFields(msgspec.Struct, frozen=True, kw_only=True):
    """`options`. An absent one has the model's own default, else no restriction.

    num_predict     output tokens at most; -1 and -2: as many as the context leaves
    num_ctx         the context that the client counts on, in tokens
    repeat_penalty  SamplingParams's repetition_penalty
    top_k           0 and less: all tokens
    seed            -1: random
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    seed: int | None = None
    num_predict: Int64 = -1
    num_ctx: Count | None = None
    stop: str | list[str] = []
    repeat_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A message. The arguments of a call are an object; tool_name names the tool of a result."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    tool_calls: list[dict[str, Any]] = []
    tool_name: str | None = None
    tool_call_id: str | None = None


_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "logprobs": (),
    "top_logprobs": (0,),
    # Their defaults are true and shorten a prompt that is too long; here it is refused.
    "truncate": (),
    "shift": (),
}

CHAT_RULES = Rules(unsupported=_UNSUPPORTED)

GENERATE_RULES = Rules(
    unsupported={
        **_UNSUPPORTED,
        "template": (),
        "suffix": (),
        "images": (),
        "context": (),
        "width": (),
        "height": (),
        "steps": (),
    }
)

SHOW_RULES = Rules(
    informational=frozenset({"verbose"}),
    unsupported={"system": (), "template": (), "options": ()},
)

MESSAGE_RULES = Rules(
    unsupported={
        "images": (),
    }
)

OPTION_RULES = Rules(
    # How a model is laid out in memory, which the server's own options decide; and parameters of
    # what is refused below, which alone have no effect in Ollama either.
    informational=frozenset(
        {
            "num_keep",
            "num_batch",
            "num_gpu",
            "main_gpu",
            "num_thread",
            "numa",
            "low_vram",
            "f16_kv",
            "use_mmap",
            "use_mlock",
            "mirostat_tau",
            "mirostat_eta",
        }
    ),
    unsupported={
        "mirostat": (0,),
        "tfs_z": (1.0, 1),
        "typical_p": (1.0, 1),
        # Penalties count all tokens so far, which is Ollama's -1.
        "repeat_last_n": (-1,),
        "penalize_newline": (True,),
        "vocab_only": (),
        "logits_all": (),
        "embedding_only": (),
    },
)
