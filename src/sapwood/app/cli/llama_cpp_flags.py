"""Flags of llama.cpp's server that people use and that are no options under the same name."""

from __future__ import annotations

from collections.abc import Mapping

from sapwood.app.cli.peer_flag import PeerFlag, hints, refused, same

_TAKES = {
    "alias": "served-model-name",
    "api-prefix": "fastapi-root-path",
    "batch-size": "chunked-prefill-size",
    "chat-template-file": "chat-template",
    "ctx-size": "context-length",
    "hf-repo": "model",
    "parallel": "max-running-requests",
    "ssl-cert-file": "ssl-certfile",
    "ssl-key-file": "ssl-keyfile",
    "threads": "num-threads",
    "timeout": "request-timeout",
}
_SHORT = {"a": "alias", "b": "batch-size", "c": "ctx-size", "hf": "hf-repo", "np": "parallel"}
_SHORT |= {"t": "threads", "to": "timeout"}

_SAME = same(
    takes={**_TAKES, **{short: _TAKES[name] for short, name in _SHORT.items()}, "m": "model"},
    switches={
        "embedding": "is-embedding",
        "embeddings": "is-embedding",
        "metrics": "enable-metrics",
        "no-warmup": "skip-server-warmup",
    },
)

_HINTS = [
    *hints(
        "all layers are on one device, which --device chooses",
        takes="n-gpu-layers gpu-layers ngl split-mode sm main-gpu mg n-gpu-layers-draft "
        "gpu-layers-draft",
    ),
    *hints("the kernels for this machine are chosen by themselves", maybe="flash-attn fa"),
    *hints("requests are always batched as they come", switches="cont-batching cb"),
    *hints("prompts take the threads of --num-threads", takes="threads-batch tb"),
    *hints("prompts are computed in chunks of --chunked-prefill-size", takes="ubatch-size ub"),
    *hints("HTTP is answered by a loop of its own", takes="threads-http"),
    *hints("templates are always Jinja", switches="jinja"),
    *hints(
        "thinking is told apart where the model has it; see --reasoning-parser",
        takes="reasoning-format",
    ),
    *hints("the state is at /server_info and /v1/loads", switches="slots no-slots props"),
    *hints("weights are mapped or read as their format allows", switches="mlock no-mmap mmap"),
    *hints("a context is never shifted", switches="no-context-shift"),
    *hints(
        "windows keep what they see; --swa-full-tokens-ratio sizes their pool", switches="swa-full"
    ),
    *hints("a model with such a head ranks without a flag", switches="reranking rerank"),
    *hints("figures are at /metrics with --enable-metrics", switches="perf no-perf"),
]

_REFUSED = [
    *refused(
        "keys and values have one type, by --kv-cache-dtype",
        takes="cache-type-k cache-type-v ctk ctv",
        harmless="f16 bf16",
    ),
    *refused("--tp-size splits a model over devices", takes="tensor-split ts"),
    *refused("choose nodes by --numa-node", takes="numa"),
    *refused(
        "set the affinity and the priority of the whole server with taskset and nice",
        takes="cpu-mask cpu-range cpu-strict prio poll",
    ),
    *refused(
        "weights stay on the device; choose --quantization to make them smaller",
        takes="override-tensor n-cpu-moe ncmoe",
        switches="cpu-moe cmoe no-kv-offload nkvo",
    ),
    *refused("requests that come together run together", switches="no-cont-batching nocb"),
    *refused(
        "a context that is full ends the answer; raise --context-length", switches="context-shift"
    ),
    *refused(
        "only whole prefixes are shared, exactly; leave it out", takes="cache-reuse", harmless="0"
    ),
    *refused(
        "take --enable-hierarchical-cache and --hicache-size, in gigabytes",
        takes="cache-ram cram",
    ),
    *refused(
        "take --enable-hierarchical-cache and --hicache-storage-backend file",
        takes="slot-save-path",
    ),
    *refused(
        "rotations are changed by --json-model-override-args",
        takes="rope-scaling rope-scale rope-freq-base rope-freq-scale yarn-orig-ctx "
        "yarn-ext-factor yarn-attn-factor yarn-beta-fast yarn-beta-slow",
    ),
    *refused(
        "a request says how many tokens, by max_tokens", takes="n-predict predict n", harmless="-1"
    ),
    *refused(
        "what requests leave open is set by --preferred-sampling-params",
        takes="temp temperature top-k top-p min-p repeat-penalty repeat-last-n presence-penalty "
        "frequency-penalty samplers reasoning-budget chat-template-kwargs",
    ),
    *refused(
        "a request brings its grammar or its schema",
        takes="grammar grammar-file json-schema json-schema-file",
    ),
    *refused(
        "adapters are named by --lora-paths, and their strength is their own",
        takes="lora lora-scaled",
        switches="lora-init-without-apply",
    ),
    *refused("there are no control vectors", many="control-vector control-vector-scaled"),
    *refused(
        "take --speculative-algorithm and --speculative-draft-model-path",
        takes="model-draft md draft-max draft-min draft-p-min ctx-size-draft device-draft",
    ),
    *refused("choose --pooling-method", takes="pooling"),
    *refused("templates are always Jinja; give one by --chat-template", switches="no-jinja"),
    *refused("the log goes to stderr; its level is --log-level", takes="log-file"),
    *refused(
        "choose --log-level", takes="log-verbosity verbosity lv", switches="log-disable verbose"
    ),
    *refused("name a repository or a file by --model", takes="model-url mu hf-file hff"),
    *refused("the hub's token is read from HF_TOKEN", takes="hf-token hft"),
    *refused("give one key by --api-key", takes="api-key-file"),
    *refused("the page at / is part of the server", takes="path", switches="no-webui"),
    *refused("files are checked by --model-checksum", switches="check-tensors"),
    *refused(
        "a server has one model; `sapwood gateway` stands in front of several",
        takes="models-dir models-max",
    ),
    *refused("the model stays loaded", takes="sleep-idle-seconds", harmless="-1"),
]

LLAMA_CPP_ROWS: Mapping[str, PeerFlag] = {row.flag: row for row in [*_SAME, *_HINTS, *_REFUSED]}
