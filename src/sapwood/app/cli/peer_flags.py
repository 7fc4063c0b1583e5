"""Flags of SGLang's, vLLM's and llama.cpp's servers that are no option, and what becomes of each.

Some are options under another name, which takes their place. A hint asks how a thing is computed,
and here there is nothing to choose: it is accepted, and said at the start. What would change
answers, memory or what is served is refused, with the way out. A flag that is an option of the
command is honoured: the option goes first, whatever is said here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import click

from sapwood.app.cli.llama_cpp_flags import LLAMA_CPP_ROWS
from sapwood.app.cli.peer_flag import GRAPHS, Fate, PeerFlag, Values, hints, refused
from sapwood.app.cli.vllm_flags import VLLM_ROWS
from sapwood.base.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Hint:
    """A hint that was given, as it was written."""

    written: str
    says: str


_KERNELS = "the kernels for this machine are chosen by themselves; --kernels overrides them"
_TOKENS = "prompts are tokenised by the server's own threads"
_COLLECTIVES = "the collectives for this machine are chosen by themselves"

_HINTS = [
    *hints(
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
    *hints(
        _COLLECTIVES,
        switches="enable-flashinfer-allreduce-fusion enable-nccl-nvls enable-symm-mem "
        "disable-flashinfer-cutlass-moe-fp4-allgather disable-custom-all-reduce enable-mscclpp "
        "enable-torch-symm-mem enable-p2p-check",
    ),
    *hints(
        GRAPHS,
        takes="piecewise-cuda-graph-compiler piecewise-cuda-graph-max-tokens torch-compile-max-bs",
        switches="disable-cuda-graph-padding enable-cudagraph-gc enable-torch-compile "
        "enable-piecewise-cuda-graph",
    ),
    *hints(
        _TOKENS,
        takes="tokenizer-worker-num dynamic-batch-tokenizer-batch-size "
        "dynamic-batch-tokenizer-batch-timeout",
        switches="enable-tokenizer-batch-encode disable-tokenizer-batch-decode "
        "enable-dynamic-batch-tokenizer",
    ),
    *hints(
        "a step takes prompt and output tokens together, as many as --chunked-prefill-size and "
        "--max-running-requests allow",
        takes="num-continuous-decode-steps scheduler-recv-interval "
        "tbo-token-distribution-threshold pp-async-batch-depth",
        switches="enable-mixed-chunk enable-dynamic-chunking enable-two-batch-overlap "
        "enable-single-batch-overlap",
    ),
    *hints("an engine without requests always sleeps", switches="sleep-on-idle"),
    *hints(
        "a page is copied whole, as it lies in the pool: all layers of a group one after the other",
        takes="hicache-io-backend hicache-mem-layout",
        switches="disable-hicache-numa-detect",
    ),
    *hints(
        "without --enable-priority-scheduling, a request more urgent than the default is refused",
        switches="abort-on-priority-when-disabled",
    ),
    *hints("usage always has the cached tokens", switches="enable-cache-report"),
    *hints(
        "towers of the checkpoint are loaded where sapwood has them", switches="enable-multimodal"
    ),
    *hints("JSON's grammars are not made by outlines", switches="disable-outlines-disk-cache"),
    *hints("it does nothing in SGLang either", switches="prefill-round-robin-balance"),
]

_REFUSED_SERVING = [
    *refused(
        "sapwood takes the tokenizer as the model's folder has it; leave the flag out",
        takes="tokenizer-mode",
        harmless="auto fast",
    ),
    *refused("there are no warm-ups of your own; send requests after /health", takes="warmups"),
    *refused("ranks find a port by themselves; see --dist-init-addr", takes="nccl-port"),
    *refused("choose the devices with CUDA_VISIBLE_DEVICES", takes="gpu-id-step", harmless="1"),
    *refused(
        "no handler can come by the command line; where the engine fails the server ends with "
        "status 1 and --crash-dump-folder keeps its requests, and SIGUSR1 prints all stacks",
        takes="custom-sigquit-handler",
    ),
    *refused(
        "there is no such measurement; see --enable-metrics and /start_profile",
        takes="gc-warning-threshold-secs",
        switches="show-time-cost enable-metrics-for-all-schedulers collect-tokens-histogram "
        "enable-request-time-stats-logging enable-profile-cuda-graph "
        "enable-layerwise-nvtx-marker enable-expert-distribution-metrics",
    ),
    *refused(
        "the prefill delayer has no histograms; leave the flag out",
        many="prefill-delayer-forward-passes-buckets prefill-delayer-wait-seconds-buckets",
    ),
    *refused("prompts of /v1/completions are taken as they are", takes="completion-template"),
    *refused(
        "the engine's server calls no tools; `sapwood gateway` calls those of MCP servers",
        takes="tool-server",
    ),
]

_REFUSED_MODEL = [
    *refused("no loader takes further settings", takes="model-loader-extra-config", harmless="{}"),
    *refused(
        "weights are loaded from files before the server is ready; give their folder as --model",
        takes="remote-instance-weight-loader-seed-instance-ip "
        "remote-instance-weight-loader-seed-instance-service-port "
        "remote-instance-weight-loader-send-weights-group-ports "
        "remote-instance-weight-loader-backend",
        many="custom-weight-loader",
        switches="checkpoint-engine-wait-weights-before-ready weight-loader-disable-mmap "
        "remote-instance-weight-loader-start-seed-via-transfer-engine",
    ),
    *refused(
        "a draft model's weights are never released, so that they need no copy; leave it out",
        switches="enable-draft-weights-cpu-backup",
    ),
    *refused(
        "scales of the KV cache are read from the checkpoint; write them there",
        takes="quantization-param-path",
    ),
    *refused(
        "the head is computed in --dtype; give --dtype float32", switches="enable-fp32-lm-head"
    ),
    *refused(
        "quantise with `sapwood convert`, or while loading with --quantization",
        takes="modelopt-quant modelopt-checkpoint-restore-path modelopt-checkpoint-save-path "
        "modelopt-export-path rl-quant-profile torchao-config flashinfer-mxfp4-moe-precision",
        switches="quantize-and-serve",
    ),
    *refused(
        "a trainer's products add in another order; see --enable-deterministic-inference",
        takes="rl-on-policy-target",
    ),
    *refused(
        "encrypted configurations are not read; decrypt the folder first",
        takes="decrypted-config-file decrypted-draft-config-file",
    ),
    *refused(
        "no code is hooked into the layers; see --enable-return-hidden-states",
        takes="forward-hooks",
    ),
    *refused(
        "nothing of the layers is dumped; see --enable-return-hidden-states",
        takes="debug-tensor-dump-output-folder debug-tensor-dump-input-file "
        "debug-tensor-dump-inject",
        many="debug-tensor-dump-layers",
        switches="enable-nan-detection enable-torch-compile-debug-mode",
    ),
    *refused(
        "diffusion language models are not served; take one that writes token by token",
        takes="dllm-algorithm dllm-algorithm-config",
    ),
    *refused(
        "attention is not made sparse; leave the flag out",
        takes="ds-channel-config-path ds-heavy-channel-num ds-heavy-token-num "
        "ds-heavy-channel-type ds-sparse-decode-threshold "
        "hierarchical-sparse-attention-extra-config nsa-prefill-cp-mode",
        switches="enable-double-sparsity enable-nsa-prefill-context-parallel",
    ),
    *refused(
        "media have no such setting; send them as the client wants them read",
        switches="enable-broadcast-mm-inputs-process mm-enable-dp-encoder enable-prefix-mm-cache "
        "disable-fast-image-processor keep-mm-feature-on-device "
        "enable-precise-embedding-interpolation",
    ),
]

_REFUSED_MACHINES = [
    *refused(
        "LMCache does not replace the tiers here, but its server can lie behind them; take "
        "--enable-hierarchical-cache and --hicache-storage-backend lmcache",
        switches="enable-lmcache",
    ),
    *refused(
        "weights lie on one kind of memory; take --quantization, or more cards with --tp-size",
        takes="kt-weight-path kt-method kt-cpuinfer kt-threadpool-count kt-num-gpu-experts "
        "kt-max-deferred-experts-per-token offload-group-size offload-num-in-group "
        "offload-prefetch-step offload-mode",
    ),
    *refused(
        "weights lie on one kind of memory; take --quantization, or more cards with --tp-size",
        takes="cpu-offload-gb",
        harmless="0",
    ),
    *refused(
        "engines that hand pages to each other have one rank; start more engines behind "
        "`sapwood gateway --pd-disaggregation`",
        takes="disaggregation-decode-tp disaggregation-decode-dp disaggregation-prefill-pp",
        harmless="1",
    ),
    *refused(
        "pages go over TCP or through shared memory; see --disaggregation-transfer-backend",
        takes="disaggregation-ib-device",
    ),
    *refused(
        "an engine computes prompts and outputs in the same steps; see --disaggregation-mode",
        takes="pdmux-config-path sm-group-num",
        switches="enable-pdmux",
    ),
    *refused(
        "an engine that generates keeps its prefixes in its own pool; give "
        "--enable-hierarchical-cache to those that read prompts",
        switches="disaggregation-decode-enable-offload-kvcache",
    ),
    *refused(
        "take --disaggregation-transfer-backend fake, for every request",
        switches="disaggregation-decode-enable-fake-auto",
    ),
    *refused(
        "the encoder runs in the engine; leave the flag out",
        takes="encoder-transfer-backend",
        many="encoder-urls",
        switches="encoder-only",
    ),
    *refused(
        "it is no choice here; see --ep-size, --moe-a2a-backend and --enable-eplb",
        takes="ep-dispatch-algorithm eplb-algorithm eplb-min-rebalancing-utilization-threshold "
        "deepep-config moe-dense-tp-size elastic-ep-backend mooncake-ib-device "
        "speculative-moe-a2a-backend",
        switches="enable-attn-tp-input-scattered",
    ),
    *refused(
        "the cache of sliding windows is sized by --swa-full-tokens-ratio",
        takes="hybrid-kvcache-ratio",
        switches="disable-hybrid-swa-memory",
    ),
]

PEER_ROWS: Mapping[str, PeerFlag] = {
    row.flag: row for row in [*_HINTS, *_REFUSED_SERVING, *_REFUSED_MODEL, *_REFUSED_MACHINES]
}

"""SGLang's; every flag of its server that is no option is here."""

_ALL_ROWS = {**LLAMA_CPP_ROWS, **VLLM_ROWS, **PEER_ROWS}


def without_peer_flags(
    args: Sequence[str], own: Collection[str], own_with_value: Collection[str]
) -> tuple[list[str], list[Hint]]:
    """The arguments without peers' flags, and the hints among these.

    own             all flags of the command, which go first
    own_with_value  those after which any argument is a value
    Raises          ConfigError for a flag that is refused, or lacks its value
    """
    kept: list[str] = []
    said: list[Hint] = []
    rest = list(reversed(args))
    while rest:
        arg = rest.pop()
        name, equals, value = arg.partition("=")
        if name == "--":
            kept += [arg, *reversed(rest)]
            break
        row = _row_of(name, own)
        if row is None:
            kept.append(arg)
            if name in own_with_value and not equals and rest:
                kept.append(rest.pop())
            continue
        values = [value] if equals else _taken(row, rest)
        if row.fate is Fate.SAME:
            kept += [row.says, *values]
            continue
        said += _judged(row, values)
    return kept, said


def _row_of(name: str, own: Collection[str]) -> PeerFlag | None:
    """The row of a flag that is not the command's own; None also if what it stands for is not."""
    row = None if name in own else _ALL_ROWS.get(name)
    return None if row is None or (row.fate is Fate.SAME and row.says not in own) else row


def file_without_peer_keys(
    file: Mapping[str, object], own: Collection[str]
) -> tuple[dict[str, object], list[Hint]]:
    """The same for the keys of a config file, which are flags without dashes in front."""
    kept: dict[str, object] = {}
    said: list[Hint] = []
    for key, value in file.items():
        plain = str(key).replace("-", "_")
        row = None if plain in own else _ALL_ROWS.get("--" + plain.replace("_", "-"))
        if row is not None and row.fate is Fate.SAME:
            kept[row.says.removeprefix("--").replace("-", "_")] = value
        elif row is None:
            kept[key] = value
        elif value is not False and value is not None:
            listed = value if isinstance(value, list) else [] if value is True else [value]
            said += _judged(row, [str(item) for item in listed])
    return kept, said


def _taken(row: PeerFlag, rest: list[str]) -> list[str]:
    """The values at the end of `rest` that belong to the flag, taken away from there."""
    values: list[str] = []
    most = {Values.NONE: 0, Values.MANY: len(rest)}.get(row.values, 1)
    another = "-" if row.values is Values.MAYBE else "--"
    while rest and len(values) < most and not rest[-1].startswith(another):
        values.append(rest.pop())
    return values


def _judged(row: PeerFlag, values: Sequence[str]) -> list[Hint]:
    if row.values is Values.NONE and values:
        raise ConfigError(f"{row.flag} is a switch, but was given the value {values[0]}")
    if row.values not in (Values.NONE, Values.MAYBE) and not values:
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
    fates = list(Fate)
    for row in sorted(rows.values(), key=lambda row: (fates.index(row.fate), row.says, row.flag)):
        harmless = f" (except {', '.join(f'`{value}`' for value in row.harmless)})"
        fate = f"{row.fate.value}{harmless if row.harmless else ''}"
        says = f"`{row.says}`" if row.fate is Fate.SAME else row.says
        lines.append(f"| `{row.flag}` | {fate} | {says} |")
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
