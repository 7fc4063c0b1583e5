"""The clients: what is installed for each, and which program uses it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

POLICIES = ("round_robin", "random", "cache_aware", "power_of_two")


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One client in an environment of its own.

    package     the client's name on PyPI or npm, whose version the table shows
    requires    what pip installs
    npm         what npm installs
    program     file below programs/
    arguments   one tuple for each run of the program
    shows       what the runs do, for the table
    borrows     the environment also sees sapwood's own packages, so that pip does not fetch another
                torch of several gigabytes
    bare        packages that pip installs without what they depend on: torch for GPUs, for instance
    stand_ins   modules without a build for this machine, which the runs import but do not use
    through_gateway  the runs go to a `sapwood gateway` in front of the servers
    """

    package: str
    program: str
    shows: str
    requires: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()
    arguments: tuple[tuple[str, ...], ...] = ((),)
    borrows: bool = False
    bare: tuple[str, ...] = ()
    stand_ins: tuple[str, ...] = ()
    through_gateway: bool = False


def _router(package: str, requirement: str, module: str) -> Client:
    return Client(
        package=package,
        requires=(requirement,),
        program="router.py",
        arguments=tuple((module, policy) for policy in POLICIES),
        shows="`/generate`, chat and completions (whole and streamed), embeddings and rerank "
        f"through the router, with the policies {', '.join(POLICIES)}",
    )


CLIENTS: dict[str, Client] = {
    "sglang-router": _router(
        "sglang-router", "sglang-router==0.3.2", "sglang_router.launch_router"
    ),
    "smg": _router("smg", "smg==1.13.0", "smg launch"),
    "smg-grpc": Client(
        package="smg",
        requires=("smg==1.13.0",),
        program="router.py",
        arguments=(("smg launch", "grpc"),),
        shows="before `--grpc-mode`, with its own tokenizer and template: `/generate`, chat and "
        "completions, whole and streamed",
    ),
    "sglang": Client(
        package="sglang",
        program="sglang_tools.py",
        shows="`sglang.bench_one_batch_server` with two batch sizes, and `sglang.profiler`",
        borrows=True,
        bare=(
            "sglang==0.5.8",
            "transformers==4.57.1",
            "huggingface_hub==0.36.0",
            "tokenizers==0.22.1",
            "datasets==4.0.0",
            "dill==0.3.8",
            "multiprocess==0.70.16",
            *("aiohappyeyeballs", "aiohttp", "aiosignal", "einops", "frozenlist", "ipython"),
            *("multidict", "pandas", "partial-json-parser", "propcache", "pyarrow", "pybase64"),
            *("sentencepiece", "setproctitle", "tabulate", "traitlets", "xxhash", "yarl"),
        ),
        stand_ins=("sgl_kernel", "torchvision"),
    ),
    "openai": Client(
        package="openai",
        requires=("openai==3.54.0",),
        program="openai_sdk.py",
        shows="chat, streams, tools, `parse`, completions, responses (`parse` and streams too) and "
        "embeddings",
    ),
    "anthropic": Client(
        package="anthropic",
        requires=("anthropic==2.12.0",),
        program="anthropic_sdk.py",
        shows="messages, streams, `messages.parse`, tools and their results, `count_tokens`",
    ),
    "ollama": Client(
        package="ollama",
        requires=("ollama==0.6.3",),
        program="ollama_sdk.py",
        shows="chat, generate, `format`, list, ps, show, pull and embed",
    ),
    "litellm": Client(
        package="litellm",
        requires=("litellm[proxy]==1.106.2",),
        program="litellm_sdk.py",
        shows="the SDK by the providers openai, hosted_vllm, ollama_chat, ollama and anthropic, "
        "embeddings and responses; the proxy's `/v1/messages` bridged to chat completions",
    ),
    "outlines": Client(
        package="outlines",
        requires=("outlines==1.3.3", "openai==3.54.0"),
        program="outlines_backends.py",
        shows="the OpenAI and vLLM backends: JSON Schema, regular expression, grammar, stream",
    ),
    "guidance": Client(
        package="guidance",
        requires=("guidance==0.3.1", "openai==3.54.0"),
        program="guidance_openai.py",
        shows="the OpenAI and vLLM backends: gen, json, select, a regular expression",
    ),
    "langchain": Client(
        package="langchain-openai",
        requires=("langchain==1.4.7", "langchain-openai==1.7.3"),
        program="langchain_chat.py",
        shows="ChatOpenAI: invoke, stream, tools, structured output by two methods, the responses "
        "API; OpenAIEmbeddings",
    ),
    "pydantic-ai": Client(
        package="pydantic-ai-slim",
        requires=("pydantic-ai-slim[openai]==2.68.0",),
        program="pydantic_agent.py",
        shows="agents over chat completions and responses: text, typed answers, a stream",
    ),
    "openai-agents": Client(
        package="openai-agents",
        requires=("openai-agents==0.24.0",),
        program="agents_sdk.py",
        shows="agents over chat completions and responses: text, a typed answer, a tool, a stream",
    ),
    "instructor": Client(
        package="instructor",
        requires=("instructor==1.17.0",),
        program="instructor_modes.py",
        shows="typed answers by tools and by JSON Schema, and a partial stream",
    ),
    "lm-eval": Client(
        package="lm_eval",
        requires=("lm-eval[api]==0.4.13", "transformers==5.23.0"),
        program="lm_eval_local.py",
        shows="a small local task by local-chat-completions, and one by local-completions with "
        "log probabilities",
    ),
    "guidellm": Client(
        package="guidellm",
        requires=("guidellm==0.8.1",),
        program="load_tools.py",
        arguments=(("guidellm",),),
        shows="a benchmark of synthetic prompts, two at a time",
        borrows=True,
    ),
    "aiperf": Client(
        package="aiperf",
        requires=("aiperf==0.13.0",),
        program="load_tools.py",
        arguments=(("aiperf",),),
        shows="a benchmark of synthetic prompts over streamed chat, two at a time",
    ),
    "claude-code": Client(
        package="@anthropic-ai/claude-code",
        npm=("@anthropic-ai/claude-code@2.1.330",),
        program="claude_code.py",
        shows="`claude -p` with a short system prompt, without tools and with one",
    ),
    "open-webui": Client(
        package="open-webui",
        requires=("open-webui==0.12.4",),
        program="open_webui.py",
        shows="its server, with sapwood as an OpenAI and as an Ollama connection: models, answers "
        "whole and streamed",
        borrows=True,
    ),
}

THROUGH_GATEWAY: dict[str, dict[str, Any]] = {
    "openai": {},
    "anthropic": {},
    "sglang": {
        "arguments": (("bench",),),
        "shows": "`sglang.bench_one_batch_server` with two batch sizes",
    },
}
"""Clients that also run through a gateway, and what differs there: it has no route for profiles."""
for _name, _changes in THROUGH_GATEWAY.items():
    _client = replace(CLIENTS[_name], through_gateway=True, **_changes)
    CLIENTS[f"{_name}-gateway"] = replace(
        _client, shows=f"through `sapwood gateway`: {_client.shows}"
    )
