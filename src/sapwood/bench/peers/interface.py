"""What a peer is: a name, and a function that opens it in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import msgspec

from sapwood.base.registry import Registry
from sapwood.bench.offline import TokenGenerator


class PeerSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What every peer is given alike.

    model_dir    directory of a transformers checkpoint (config.json, safetensors, tokenizer)
    dtype        "bfloat16", "float32" or "float16": of weights, activations and KV
    num_threads  threads that compute
    """

    model_dir: str
    dtype: str
    num_threads: int


OpenPeer = Callable[[PeerSetup], AbstractContextManager[TokenGenerator]]
"""Loads the model; leaving the context frees it. Runs in the peer's process, imports late."""

PEERS: Registry[OpenPeer] = Registry(
    "peer",
    {
        "sapwood": "sapwood.bench.peers.sapwood_peer:open_sapwood",
        "transformers": "sapwood.bench.peers.transformers_peer:open_transformers",
    },
    entry_point="sapwood.bench_peers",
)
