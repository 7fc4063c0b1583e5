"""What somebody may have meant who gave a flag or command that sapwood does not have."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

PEER_FLAGS: Mapping[str, str] = {
    "--max-model-len": "--context-length",
    "--ctx-size": "--context-length",
    "--max-num-seqs": "--max-running-requests",
    "--parallel": "--max-running-requests",
    "--max-num-batched-tokens": "--chunked-prefill-size",
    "--batch-size": "--chunked-prefill-size",
    "--ubatch-size": "--chunked-prefill-size",
    "--gpu-memory-utilization": "--mem-fraction-static",
    "--block-size": "--page-size",
    "--enforce-eager": "--disable-graphs",
    "--no-enable-prefix-caching": "--disable-radix-cache",
    "--num-gpu-blocks-override": "--max-total-tokens",
    "--scheduling-policy": "--schedule-policy",
    "--tokenizer": "--tokenizer-path",
    "--alias": "--served-model-name",
    "--seed": "--random-seed",
    "--uvicorn-log-level": "--log-level",
    "--hf-repo": "--model",
    "--cache-type-k": "--kv-cache-dtype",
    "--cache-type-v": "--kv-cache-dtype",
    "--threads": "--num-threads",
    "--n-gpu-layers": "--device",
    "--embedding": "--is-embedding",
    "--embeddings": "--is-embedding",
    "--metrics": "--enable-metrics",
    "--ssl-cert-file": "--ssl-certfile",
    "--ssl-key-file": "--ssl-keyfile",
    "--guided-decoding-backend": "--grammar-backend",
    "--generation-config": "--sampling-defaults",
    "--enable-log-requests": "--log-requests",
    "--timeout": "--request-timeout",
    "--chat-template-file": "--chat-template",
}
"""Flags of vLLM, SGLang and llama.cpp's server, and what is the same or next to it here."""

ALWAYS_ON: Mapping[str, str] = {
    "--enable-prefix-caching": "prefixes are always shared; --disable-radix-cache turns that off",
    "--enable-chunked-prefill": "long prompts are always computed in chunks; see "
    "--chunked-prefill-size",
    "--enable-auto-tool-choice": "tools may always be called where the model can; see "
    "--tool-call-parser",
    "--jinja": "the model's own chat template is always used; see --chat-template",
    "--cont-batching": "requests are always batched as they come",
    "--flash-attn": "the kernels for this machine are chosen by themselves; see --kernels",
    "--mmap": "weights are always mapped where that is possible",
}
"""Flags of peers for what sapwood does without being asked."""

PEER_COMMANDS: Mapping[str, str] = {
    "launch_server": "serve",
    "start": "serve",
    "server": "serve",
    "run-batch": "generate",
    "complete": "generate",
    "quantize": "convert",
    "download": "pull",
    "ls": "list",
    "remove": "rm",
    "delete": "rm",
    "show": "check",
    "status": "ps",
    "doctor": "check",
}
"""Commands of Ollama, vLLM, SGLang and llama.cpp, and those that do the same here."""


def flag_hint(flag: str, known: Collection[str]) -> str:
    """What to say of a flag that a command does not have, beginning with "; "; "" if nothing is
    like it.

    known  the command's own flags
    """
    asked = flag.partition("=")[0].replace("_", "-")
    if asked in known:
        return f"; here it is written {asked}"
    if asked in ALWAYS_ON:
        return f": {ALWAYS_ON[asked]}"
    if PEER_FLAGS.get(asked) in known:
        return f"; here it is {PEER_FLAGS[asked]}"
    theirs = [name for name, own in PEER_FLAGS.items() if own in known]
    close = difflib.get_close_matches(asked, [*sorted(known), *theirs], n=3, cutoff=0.7)
    return _did_you_mean([PEER_FLAGS.get(name, name) for name in close])


def command_hint(name: str, known: Collection[str]) -> str:
    """The same of a command."""
    if PEER_COMMANDS.get(name) in known:
        return _did_you_mean([PEER_COMMANDS[name]])
    return _did_you_mean(difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5))


def _did_you_mean(names: list[str]) -> str:
    different = list(dict.fromkeys(names))
    return f"; did you mean {' or '.join(different)}?" if different else ""
