"""What a peer is: a name, and a function that opens it in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import msgspec

from sapwood.base.registry import Registry
from sapwood.bench.offline import TokenGenerator

OptionValue = bool | int | float | str | list[str] | None


class PeerSetup(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a peer.

    model_dir    directory of a transformers checkpoint (config.json, safetensors, tokenizer)
    dtype        dtype of weights, activations and KV: "bfloat16", "float32" or "float16"
    num_threads  threads that compute
    options      settings for this peer alone, by the peer's own names
    """

    model_dir: str
    dtype: str
    num_threads: int
    options: dict[str, OptionValue] = {}


OpenPeer = Callable[[PeerSetup], AbstractContextManager[TokenGenerator]]
"""Loads the model; leaving the context frees it. It runs in the peer's process."""

PEERS: Registry[OpenPeer] = Registry(
    "peer",
    {
        "llama_cpp": "sapwood.bench.peers.llama_cpp_peer:open_llama_cpp",
        "openvino": "sapwood.bench.peers.openvino_peer:open_openvino",
        "sapwood": "sapwood.bench.peers.sapwood_peer:open_sapwood",
        "server": "sapwood.bench.peers.server_peer:open_server",
        "transformers": "sapwood.bench.peers.transformers_peer:open_transformers",
        "vllm": "sapwood.bench.peers.vllm_peer:open_vllm",
    },
    entry_point="sapwood.bench_peers",
)
