"""Flags of SGLang's and vLLM's servers that sapwood has no option for, and what becomes of each.

A hint asks how a thing is computed, and here there is nothing to choose: it is accepted, and said
at the start. What would change answers, memory or what is served is refused, with the way out. A
flag that is an option of the command is honoured: the option goes first, whatever is said here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import click

from sapwood.base.errors import ConfigError


class Fate(StrEnum):
    HINT = "hint"
    REFUSED = "refused"


class Values(StrEnum):
    """How many values follow a flag."""

    NONE = "none"
    ONE = "one"
    MANY = "many"


@dataclass(frozen=True, slots=True)
class PeerFlag:
    """One flag; `says` is what happens instead (a hint), or the reason and the way out."""

    flag: str
    fate: Fate
    says: str
    values: Values = Values.ONE
    harmless: tuple[str, ...] = ()
    """Values of a refused flag that ask for what is so anyway."""


@dataclass(frozen=True, slots=True)
class Hint:
    """A hint that was given, as it was written."""

    written: str
    says: str


def _rows(fate: Fate, values: Values, says: str, flags: str) -> list[PeerFlag]:
    return [PeerFlag(f"--{name}", fate, says, values) for name in flags.split()]


def _hints(says: str, *, takes: str = "", switches: str = "", many: str = "") -> list[PeerFlag]:
    return [
        *_rows(Fate.HINT, Values.ONE, says, takes),
        *_rows(Fate.HINT, Values.NONE, says, switches),
        *_rows(Fate.HINT, Values.MANY, says, many),
    ]


def _refused(
    says: str, *, takes: str = "", switches: str = "", many: str = "", harmless: str = ""
) -> list[PeerFlag]:
    rows = [
        *_rows(Fate.REFUSED, Values.ONE, says, takes),
        *_rows(Fate.REFUSED, Values.NONE, says, switches),
        *_rows(Fate.REFUSED, Values.MANY, says, many),
    ]
    return [replace(row, harmless=tuple(harmless.split())) for row in rows]


_KERNELS = "the kernels for this machine are chosen by themselves; --kernels overrides them"
_TOKENS = "prompts are tokenised by the server's own threads"
_GRAPHS = "graphs are captured by sapwood's own rules; --disable-graphs turns them off"
_COLLECTIVES = "the collectives for this machine are chosen by themselves"

_HINTS = [
    *_hints(
        _KERNELS,
        takes="attention-backend prefill-attention-backend decode-attention-backend "
        "sampling-backend mm-attention-backend nsa-prefill-backend nsa-decode-backend "
        "fp8-gemm-backend fp4-gemm-backend moe-runner-backend speculative-attention-mode "
        "speculative-draft-attention-backend speculative-moe-runner-backend lora-backend "
        "max-lora-chunk-size triton-attention-num-kv-splits triton-attention-split-tile-size",
        switches="disable-flashinfer-autotune triton-attention-reduce-in-fp32 "
        "flashinfer-mla-disable-ragged disable-shared-experts-fusion "
        "disable-chunked-prefix-cache enable-fused-qk-norm-rope",
    ),
    *_hints(
        _COLLECTIVES,
        switches="enable-flashinfer-allreduce-fusion enable-nccl-nvls enable-symm-mem "
        "disable-flashinfer-cutlass-moe-fp4-allgather disable-custom-all-reduce enable-mscclpp "
        "enable-torch-symm-mem enable-p2p-check",
    ),
    *_hints(
        _GRAPHS,
        takes="piecewise-cuda-graph-compiler piecewise-cuda-graph-max-tokens torch-compile-max-bs",
        switches="disable-cuda-graph-padding enable-cudagraph-gc enable-torch-compile "
        "enable-piecewise-cuda-graph",
    ),
    *_hints(
        _TOKENS,
        takes="tokenizer-worker-num dynamic-batch-tokenizer-batch-size "
        "dynamic-batch-tokenizer-batch-timeout",
        switches="enable-tokenizer-batch-encode disable-tokenizer-batch-decode "
        "enable-dynamic-batch-tokenizer",
    ),
    *_hints(
        "a step takes prompt and output tokens together, as many as --chunked-prefill-size and "
        "--max-running-requests allow",
        takes="num-continuous-decode-steps scheduler-recv-interval "
        "tbo-token-distribution-threshold pp-async-batch-depth",
        switches="enable-mixed-chunk enable-dynamic-chunking enable-two-batch-overlap "
        "enable-single-batch-overlap",
    ),
    *_hints("an engine without requests always sleeps", switches="sleep-on-idle"),
    *_hints(
        "a page is copied whole, as it lies in the pool: all layers of a group one after the other",
        takes="hicache-io-backend hicache-mem-layout",
        switches="disable-hicache-numa-detect",
    ),
    *_hints("usage always has the cached tokens", switches="enable-cache-report"),
    *_hints(
        "towers of the checkpoint are loaded where sapwood has them", switches="enable-multimodal"
    ),
    *_hints("JSON's grammars are not made by outlines", switches="disable-outlines-disk-cache"),
    *_hints("it does nothing in SGLang either", switches="prefill-round-robin-balance"),
]

_REFUSED_SERVING = [
    *_refused(
        "sapwood takes the tokenizer as the model's folder has it; leave the flag out",
        takes="tokenizer-mode",
        harmless="auto fast",
    ),
    *_refused(
        "the server always has a tokenizer; leave it out and send input_ids to /generate, or take "
        "--grpc-mode",
        switches="skip-tokenizer-init",
    ),
    *_refused("there are no warm-ups of your own; send requests after /health", takes="warmups"),
    *_refused("ranks find a port by themselves; see --dist-init-addr", takes="nccl-port"),
    *_refused(
        "each event of /generate has all of the text so far; take the OpenAI routes, which send "
        "what is new",
        switches="stream-output",
    ),
    *_refused("choose the devices with CUDA_VISIBLE_DEVICES", takes="gpu-id-step", harmless="1"),
    *_refused(
        "no handler can come by the command line; where the engine fails the server ends with "
        "status 1 and --crash-dump-folder keeps its requests, and SIGUSR1 prints all stacks",
        takes="custom-sigquit-handler",
    ),
    *_refused(
        "there is no such measurement; see --enable-metrics and /start_profile",
        takes="gc-warning-threshold-secs",
        switches="show-time-cost enable-metrics-for-all-schedulers collect-tokens-histogram "
        "enable-request-time-stats-logging enable-profile-cuda-graph "
        "enable-layerwise-nvtx-marker enable-expert-distribution-metrics",
    ),
    *_refused(
        "the prefill delayer has no histograms; leave the flag out",
        many="prefill-delayer-forward-passes-buckets prefill-delayer-wait-seconds-buckets",
    ),
    *_refused("give the template itself with --chat-template", takes="hf-chat-template-name"),
    *_refused("prompts of /v1/completions are taken as they are", takes="completion-template"),
    *_refused(
        "the engine's server calls no tools; `sapwood gateway` calls those of MCP servers",
        takes="tool-server",
    ),
    *_refused(
        "a request with a priority is not refused; see --enable-priority-scheduling",
        switches="abort-on-priority-when-disabled",
    ),
    *_refused(
        "a prompt that is too long is refused; truncate it in the client",
        switches="allow-auto-truncate",
    ),
    *_refused("score the items one by one with /v1/score", takes="multi-item-scoring-delimiter"),
]

_REFUSED_MODEL = [
    *_refused("no loader takes further settings", takes="model-loader-extra-config", harmless="{}"),
    *_refused(
        "weights are loaded from files before the server is ready; give their folder as --model",
        takes="remote-instance-weight-loader-seed-instance-ip "
        "remote-instance-weight-loader-seed-instance-service-port "
        "remote-instance-weight-loader-send-weights-group-ports "
        "remote-instance-weight-loader-backend",
        many="custom-weight-loader",
        switches="checkpoint-engine-wait-weights-before-ready weight-loader-disable-mmap "
        "remote-instance-weight-loader-start-seed-via-transfer-engine",
    ),
    *_refused(
        "a draft model's weights are never released, so that they need no copy; leave it out",
        switches="enable-draft-weights-cpu-backup",
    ),
    *_refused(
        "scales of the KV cache are read from the checkpoint; write them there",
        takes="quantization-param-path",
    ),
    *_refused(
        "the head is computed in --dtype; give --dtype float32", switches="enable-fp32-lm-head"
    ),
    *_refused(
        "quantise with `sapwood convert`, or while loading with --quantization",
        takes="modelopt-quant modelopt-checkpoint-restore-path modelopt-checkpoint-save-path "
        "modelopt-export-path rl-quant-profile torchao-config flashinfer-mxfp4-moe-precision",
        switches="quantize-and-serve",
    ),
    *_refused(
        "a trainer's products add in another order; see --enable-deterministic-inference",
        takes="rl-on-policy-target",
    ),
    *_refused(
        "encrypted configurations are not read; decrypt the folder first",
        takes="decrypted-config-file decrypted-draft-config-file",
    ),
    *_refused(
        "no code is hooked into the layers; see --enable-return-hidden-states",
        takes="forward-hooks",
    ),
    *_refused(
        "nothing of the layers is dumped; see --enable-return-hidden-states",
        takes="debug-tensor-dump-output-folder debug-tensor-dump-input-file "
        "debug-tensor-dump-inject",
        many="debug-tensor-dump-layers",
        switches="enable-nan-detection enable-torch-compile-debug-mode",
    ),
    *_refused(
        "diffusion language models are not served; take one that writes token by token",
        takes="dllm-algorithm dllm-algorithm-config",
    ),
    *_refused(
        "attention is not made sparse; leave the flag out",
        takes="ds-channel-config-path ds-heavy-channel-num ds-heavy-token-num "
        "ds-heavy-channel-type ds-sparse-decode-threshold "
        "hierarchical-sparse-attention-extra-config nsa-prefill-cp-mode",
        switches="enable-double-sparsity enable-nsa-prefill-context-parallel",
    ),
    *_refused(
        "media have no such setting; send them as the client wants them read",
        switches="enable-broadcast-mm-inputs-process mm-enable-dp-encoder enable-prefix-mm-cache "
        "disable-fast-image-processor keep-mm-feature-on-device "
        "enable-precise-embedding-interpolation",
    ),
]

_REFUSED_MACHINES = [
    *_refused(
        "LMCache is not called by sapwood; take --enable-hierarchical-cache and "
        "--hicache-storage-backend",
        switches="enable-lmcache",
    ),
    *_refused(
        "weights lie on one kind of memory; take --quantization, or more cards with --tp-size",
        takes="kt-weight-path kt-method kt-cpuinfer kt-threadpool-count kt-num-gpu-experts "
        "kt-max-deferred-experts-per-token offload-group-size offload-num-in-group "
        "offload-prefetch-step offload-mode",
    ),
    *_refused(
        "weights lie on one kind of memory; take --quantization, or more cards with --tp-size",
        takes="cpu-offload-gb",
        harmless="0",
    ),
    *_refused(
        "engines that hand pages to each other have one rank; start more engines behind "
        "`sapwood gateway --pd-disaggregation`",
        takes="disaggregation-decode-tp disaggregation-decode-dp disaggregation-prefill-pp",
        harmless="1",
    ),
    *_refused(
        "pages go over TCP or through shared memory; see --disaggregation-transfer-backend",
        takes="disaggregation-ib-device",
    ),
    *_refused(
        "an engine computes prompts and outputs in the same steps; see --disaggregation-mode",
        takes="pdmux-config-path sm-group-num",
        switches="enable-pdmux",
    ),
    *_refused(
        "an engine that generates keeps its prefixes in its own pool; give "
        "--enable-hierarchical-cache to those that read prompts",
        switches="disaggregation-decode-enable-offload-kvcache",
    ),
    *_refused(
        "take --disaggregation-transfer-backend fake, for every request",
        switches="disaggregation-decode-enable-fake-auto",
    ),
    *_refused(
        "the encoder runs in the engine; leave the flag out",
        takes="encoder-transfer-backend",
        many="encoder-urls",
        switches="encoder-only",
    ),
    *_refused(
        "it is no choice here; see --ep-size, --moe-a2a-backend and --enable-eplb",
        takes="ep-dispatch-algorithm eplb-algorithm eplb-min-rebalancing-utilization-threshold "
        "deepep-config moe-dense-tp-size elastic-ep-backend mooncake-ib-device "
        "speculative-moe-a2a-backend",
        switches="enable-attn-tp-input-scattered",
    ),
    *_refused(
        "the cache of sliding windows is sized by --swa-full-tokens-ratio",
        takes="hybrid-kvcache-ratio",
        switches="disable-hybrid-swa-memory",
    ),
]

PEER_ROWS: Mapping[str, PeerFlag] = {
    row.flag: row for row in [*_HINTS, *_REFUSED_SERVING, *_REFUSED_MODEL, *_REFUSED_MACHINES]
}

"""SGLang's; every flag of its server that is no option is here."""

_VLLM = [
    *_hints(
        "prompts are always computed in chunks, of --chunked-prefill-size tokens",
        switches="enable-chunked-prefill",
    ),
    *_hints(
        "prefixes are cached unless --disable-radix-cache is given",
        switches="enable-prefix-caching",
    ),
    *_hints("calls of functions are read without it", switches="enable-auto-tool-choice"),
    *_hints(
        "requests are logged with --log-requests alone",
        switches="disable-log-requests no-enable-log-requests",
    ),
    *_hints("usage always has the cached tokens", switches="enable-prompt-tokens-details"),
    *_hints(
        _GRAPHS, takes="max-seq-len-to-capture compilation-config", many="cudagraph-capture-sizes"
    ),
    *_refused(
        "prompts are always computed in chunks; --chunked-prefill-size says how long these are",
        switches="no-enable-chunked-prefill",
    ),
    *_refused("say over how many ranks, by --ep-size", switches="enable-expert-parallel"),
    *_refused(
        "ranks are processes that sapwood starts itself; leave the flag out",
        takes="distributed-executor-backend",
        harmless="mp uni",
    ),
    *_refused(
        "requests that wait again are not swapped out; --enable-hierarchical-cache keeps their "
        "prefixes in the host's memory",
        takes="swap-space",
        harmless="0",
    ),
    *_refused(
        "one process answers HTTP; --dp-size has several engines behind it",
        takes="api-server-count",
        harmless="1",
    ),
]
VLLM_ROWS: Mapping[str, PeerFlag] = {row.flag: row for row in _VLLM}
"""Some of vLLM's; flags that are options under another name are answered by suggestions.py."""

_ALL_ROWS = {**VLLM_ROWS, **PEER_ROWS}


def without_peer_flags(
    args: Sequence[str], own: Collection[str], own_with_value: Collection[str]
) -> tuple[list[str], list[Hint]]:
    """The arguments without peers' flags, and the hints among these.

    own             all flags of the command, which go first
    own_with_value  those after which any argument is a value
    Raises          ConfigError for a flag that is refused, or lacks its value
    """
    kept: list[str] = []
    hints: list[Hint] = []
    rest = list(reversed(args))
    while rest:
        arg = rest.pop()
        name, equals, value = arg.partition("=")
        if name == "--":
            kept += [arg, *reversed(rest)]
            break
        row = None if name in own else _ALL_ROWS.get(name)
        if row is None:
            kept.append(arg)
            if name in own_with_value and not equals and rest:
                kept.append(rest.pop())
            continue
        values = [value] if equals else _taken(row, rest)
        hints += _judged(row, values)
    return kept, hints


def file_without_peer_keys(
    file: Mapping[str, object], own: Collection[str]
) -> tuple[dict[str, object], list[Hint]]:
    """The same for the keys of a config file, which are flags without dashes in front."""
    kept: dict[str, object] = {}
    hints: list[Hint] = []
    for key, value in file.items():
        plain = str(key).replace("-", "_")
        row = None if plain in own else _ALL_ROWS.get("--" + plain.replace("_", "-"))
        if row is None:
            kept[key] = value
        elif value is not False and value is not None:
            listed = value if isinstance(value, list) else [] if value is True else [value]
            hints += _judged(row, [str(item) for item in listed])
    return kept, hints


def _taken(row: PeerFlag, rest: list[str]) -> list[str]:
    """The values at the end of `rest` that belong to the flag, taken away from there."""
    values: list[str] = []
    most = {Values.NONE: 0, Values.ONE: 1, Values.MANY: len(rest)}[row.values]
    while rest and len(values) < most and not rest[-1].startswith("--"):
        values.append(rest.pop())
    return values


def _judged(row: PeerFlag, values: Sequence[str]) -> list[Hint]:
    if row.values is Values.NONE and values:
        raise ConfigError(f"{row.flag} is a switch, but was given the value {values[0]}")
    if row.values is not Values.NONE and not values:
        raise ConfigError(f"{row.flag} needs a value")
    written = " ".join([row.flag, *values])
    if row.fate is Fate.HINT:
        return [Hint(written, row.says)]
    if values and all(value in row.harmless for value in values):
        return [Hint(written, "it is so without the flag")]
    raise ConfigError(f"{row.flag} is not served: {row.says}")


def as_markdown(peer: str, rows: Mapping[str, PeerFlag]) -> str:
    """A table of a peer's flags that are no option of sapwood."""
    lines = [f"| {peer} | | sapwood |", "|---|---|---|"]
    for row in sorted(rows.values(), key=lambda row: (row.fate, row.says, row.flag)):
        harmless = f" (except {', '.join(f'`{value}`' for value in row.harmless)})"
        fate = f"{row.fate.value}{harmless if row.harmless else ''}"
        lines.append(f"| `{row.flag}` | {fate} | {row.says} |")
    return "\n".join(lines)


def say_hints(hints: Sequence[Hint], *, is_strict: bool) -> None:
    """A line per flag of a peer that has nothing to choose here; ConfigError if --strict-flags."""
    for hint in hints:
        if is_strict:
            raise ConfigError(
                f"{hint.written} has nothing to choose here: {hint.says}; leave it out, or "
                "--strict-flags"
            )
        click.echo(f"sapwood: {hint.written} has nothing to choose here: {hint.says}", err=True)
