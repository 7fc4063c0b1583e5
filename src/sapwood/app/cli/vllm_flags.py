"""Flags of vLLM's server that people use and that are no options under the same name."""

from __future__ import annotations

from collections.abc import Mapping

from sapwood.app.cli.peer_flag import GRAPHS, PeerFlag, hints, refused, same

_SAME = same(
    takes={
        "block-size": "page-size",
        "gpu-memory-utilization": "mem-fraction-static",
        "hf-overrides": "json-model-override-args",
        "lora-modules": "lora-paths",
        "max-cpu-loras": "max-loaded-loras",
        "max-loras": "max-loras-per-batch",
        "max-model-len": "context-length",
        "max-num-batched-tokens": "chunked-prefill-size",
        "max-num-seqs": "max-running-requests",
        "mm-processor-kwargs": "mm-process-config",
        "num-gpu-blocks-override": "max-total-tokens",
        "root-path": "fastapi-root-path",
        "seed": "random-seed",
        "tokenizer": "tokenizer-path",
        "uvicorn-log-level": "log-level-http",
    },
    switches={
        "enable-log-requests": "log-requests",
        "enable-sleep-mode": "enable-memory-saver",
        "enforce-eager": "disable-graphs",
        "language-model-only": "language-only",
        "no-enable-prefix-caching": "disable-radix-cache",
    },
)

_HINTS = [
    *hints(
        "prompts are always computed in chunks, of --chunked-prefill-size tokens",
        takes="max-num-partial-prefills long-prefill-token-threshold",
        switches="enable-chunked-prefill",
    ),
    *hints(
        "prefixes are cached unless --disable-radix-cache is given",
        takes="prefix-caching-hash-algo",
        switches="enable-prefix-caching",
    ),
    *hints("calls of functions are read without it", switches="enable-auto-tool-choice"),
    *hints(
        "requests are logged with --log-requests alone",
        takes="max-log-len",
        switches="disable-log-requests no-enable-log-requests disable-uvicorn-access-log",
    ),
    *hints("usage always has the cached tokens", switches="enable-prompt-tokens-details"),
    *hints(
        GRAPHS, takes="max-seq-len-to-capture compilation-config", many="cudagraph-capture-sizes"
    ),
    *hints(
        "steps overlap with what follows them; --overlap-depth says how far",
        switches="async-scheduling",
    ),
    *hints(
        "the load is at /v1/loads, and figures at /metrics with --enable-metrics",
        switches="enable-server-load-tracking disable-log-stats",
    ),
    *hints("every answer has x-request-id", switches="enable-request-id-headers"),
    *hints(
        "the form of a message's content is found in the template",
        takes="chat-template-content-format",
    ),
    *hints("one process answers HTTP", switches="disable-frontend-multiprocessing"),
    *hints("an 8-bit KV cache has a scale for each token and head", switches="calculate-kv-scales"),
    *hints("weights are read as fast as the files come", takes="max-parallel-loading-workers"),
]

_REFUSED = [
    *refused(
        "prompts are always computed in chunks; --chunked-prefill-size says how long these are",
        switches="no-enable-chunked-prefill",
    ),
    *refused("say over how many ranks, by --ep-size", switches="enable-expert-parallel"),
    *refused(
        "ranks are processes that sapwood starts itself; leave the flag out",
        takes="distributed-executor-backend",
        harmless="mp uni",
    ),
    *refused(
        "requests that wait again are not swapped out; --enable-hierarchical-cache keeps their "
        "prefixes in the host's memory",
        takes="swap-space",
        harmless="0",
    ),
    *refused(
        "one process answers HTTP; --dp-size has several engines behind it",
        takes="api-server-count",
        harmless="1",
    ),
    *refused("name the algorithm by --speculative-algorithm", takes="speculative-config"),
    *refused(
        "take --enable-priority-scheduling, and --schedule-low-priority-values-first for vLLM's "
        "order",
        takes="scheduling-policy",
        harmless="fcfs",
    ),
    *refused(
        "take --sampling-defaults openai in the place of vllm, and --sampling-defaults model of "
        "auto",
        takes="generation-config",
    ),
    *refused(
        "take --preferred-sampling-params, with the same JSON", takes="override-generation-config"
    ),
    *refused("take --is-embedding; encoders and classifiers need no flag", takes="runner task"),
    *refused("the model's own head is served", takes="convert pooler-config"),
    *refused("take --limit-mm-data-per-request, with the same JSON", takes="limit-mm-per-prompt"),
    *refused("take --vlm-cache-size-mb, in megabytes", takes="mm-processor-cache-gb"),
    *refused("choose --grammar-backend", takes="guided-decoding-backend structured-outputs-config"),
    *refused("a request asks for at most --max-logprobs-per-call numbers", takes="max-logprobs"),
    *refused("ranks meet at --dist-init-addr", takes="master-addr master-port"),
    *refused(
        "run one server per machine, and `sapwood gateway` in front of them",
        takes="data-parallel-size-local data-parallel-address data-parallel-rpc-port "
        "data-parallel-backend",
        switches="headless",
    ),
    *refused(
        "the tokenizer and the model's code are of --revision",
        takes="tokenizer-revision code-revision",
    ),
    *refused("tool parsers come by an entry point of a package", takes="tool-parser-plugin"),
    *refused("logits processors come by an entry point of a package", many="logits-processors"),
    *refused("windows are part of the model", switches="disable-sliding-window"),
    *refused("pages are moved by --hicache-storage-backend", takes="kv-transfer-config"),
    *refused("adapters are split as the model is", switches="fully-sharded-loras"),
    *refused("adapters have the model's dtype", takes="lora-dtype", harmless="auto"),
    *refused("size the KV cache by --max-total-tokens", takes="kv-cache-memory-bytes"),
    *refused(
        "origins are named by --allowed-origins; methods and headers follow from the routes",
        takes="allowed-methods allowed-headers",
        switches="allow-credentials",
    ),
]

VLLM_ROWS: Mapping[str, PeerFlag] = {row.flag: row for row in [*_SAME, *_HINTS, *_REFUSED]}
