"""Puts a conversion together: the model's files, its kernels, the texts and the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sapwood.app.building.model_defaults import checkpoint_dtype, read_json
from sapwood.app.building.model_impl import SAPWOOD, TRANSFORMERS
from sapwood.app.building.resolving import Resolved, resolve_config
from sapwood.base.errors import ConfigError
from sapwood.convert.conversion import Conversion, Texts, convert, cut
from sapwood.convert.estimate import estimate_s
from sapwood.convert.layouts import num_bytes
from sapwood.convert.merging import Merged, merge
from sapwood.convert.options import DEFAULT_CALIBRATION_TOKENS, ConvertOptions
from sapwood.convert.plan import Plan, make_plan
from sapwood.convert.walk import Walk
from sapwood.convert.writer import check_target, new_directory, write_json
from sapwood.kernels.kv_cache import DTYPES
from sapwood.layers.build import Build
from sapwood.lora.config import read_config
from sapwood.lora.tensors import read_tensors
from sapwood.models.lm.architecture import Architecture
from sapwood.models.loader.gguf import PLAIN_TYPES, stored_tensors
from sapwood.models.registry import decoder_class
from sapwood.schema.config.engine import EngineConfig
from sapwood.store import ModelFiles, Progress, open_store
from sapwood.text.standard_library import library_text, package_text
from sapwood.text.tokenizer import Tokenizer

REPORT = "conversion.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """How the weights of a GGUF file are quantised.

    types  names of the types of the layers to convert, most frequent first: "Q4_1, Q6_K"
    bits   bits per weight in the file, scales included
    """

    types: str
    bits: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A conversion that can be done: everything is decided, and nothing is written.

    hf_config     the model's config.json
    stored_dtype  dtype of the tensors that are not converted
    source        how the layers to convert are quantised already; None: they are not
    """

    resolved: Resolved
    options: ConvertOptions
    output: Path
    force: bool
    hf_config: Mapping[str, Any]
    architecture: type[Architecture]
    plan: Plan
    stored_dtype: torch.dtype
    source: Source | None

    def describe(self) -> list[str]:
        """The conversion in words, for people."""
        scheme, plan = self.plan.scheme, self.plan
        before, after = plan.num_bytes(self.stored_dtype)
        scale = {
            "channel": "a scale per output",
            "group": f"a scale per {scheme.group_size} inputs",
            "tensor_group": f"a scale per {scheme.group_size} inputs and one per product",
            "block": "a scale per 128 x 128 weights",
        }[scheme.strategy]
        zero = "" if scheme.symmetric else " and a zero point"
        how = self.options.rounding + (", rescaled" if self.options.rescales else "")
        stored = str(self.stored_dtype).removeprefix("torch.")
        return [
            f"{self.resolved.files.name} -> {self.output}",
            f"{scheme.layout}: {len(plan.converted)} linear layers in {self.options.scheme}, "
            f"{scale}{zero}; {how}",
            f"in {stored} as they are: {_few(plan.ignored)}, embedding, norms, biases",
            f"{before / 1e6:.1f} MB of tensors become {after / 1e6:.1f} MB",
            *self._source_warning(),
        ]

    def _source_warning(self) -> list[str]:
        """What a source loses that was rounded before; nothing for a source in 16 or 32 bits."""
        source = self.source
        if source is None:
            return []
        plan = self.plan
        linears = [plan.shapes[f"{name}.weight"] for name in plan.converted]
        numbers = sum(math.prod(shape) for shape in linears)
        stored = sum(num_bytes(plan.scheme, (n, m), self.stored_dtype) for n, m in linears)
        bits = 8 * stored / numbers
        have = f"warning: {self.resolved.files.name} is quantised already ({source.types}, "
        have += f"{source.bits:.1f} bits a weight)"
        advice = "convert the model's unquantised checkpoint if there is one"
        if source.bits < bits:
            return [
                f"{have}, with fewer bits than the {bits:.1f} of {self.options.scheme}: the result "
                f"will be larger and no more exact; {advice}, or serve the file as it is "
                f"(sapwood serve --model {self.resolved.files.name})"
            ]
        return [f"{have}: its weights are rounded a second time; {advice}"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """The result of a conversion."""

    conversion: Conversion

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The rows of the printed table: (name, before, after, change)."""
        found = self.conversion
        before, after = found.bytes_before, found.bytes_after
        rows = [("MB", f"{before / 1e6:.1f}", f"{after / 1e6:.1f}", f"{after / before - 1:+.1%}")]
        if found.perplexity_before is not None and found.perplexity_after is not None:
            first, second = found.perplexity_before, found.perplexity_after
            rows.append(
                (
                    f"perplexity ({found.num_scored_tokens} tokens)",
                    f"{first:.4f}",
                    f"{second:.4f}",
                    f"{second / first - 1:+.2%}",
                )
            )
        return rows


def prepare(
    config: EngineConfig,
    options: ConvertOptions,
    output: Path,
    *,
    ignore: Sequence[str],
    force: bool,
    home: Path,
    progress: Progress | None = None,
) -> Job:
    """Fetch the model and decide everything. StartupError if the conversion is impossible."""
    check_target(output, force=force)
    if config.model.load_format == "dummy":
        raise ConfigError("--load-format dummy has no weights to convert; give a model that does")
    if config.model.model_impl == TRANSFORMERS:
        raise ConfigError(
            "a conversion walks through sapwood's own layers; leave out --model-impl transformers"
        )
    config = replace(config, model=replace(config.model, model_impl=SAPWOOD))
    resolved = resolve_config(config, home=home, progress=progress)
    files, decoder = resolved.files, resolved.decoder
    if files.path.resolve() == output.resolve():
        raise ConfigError(f"{output} is the model itself; name another directory")
    hf_config = read_json(files.path / "config.json")
    if hf_config.get("quantization_config"):
        raise ConfigError(
            f"{files.name} is quantised already "
            f"({hf_config['quantization_config'].get('quant_method', 'unknown')}); convert the "
            "model's unquantised checkpoint"
        )
    context_length = resolved.config.model.context_length
    if options.window > context_length:
        raise ConfigError(
            f"--window is {options.window} but the model's context is {context_length} tokens"
        )
    architecture = decoder_class(decoder.architecture)
    if options.rescale is None and not architecture.can_be_rescaled:
        options = replace(options, rescale=False)
    plan = make_plan(architecture, decoder, resolved.kernels.kernels, options, ignore=ignore)
    return Job(
        resolved=resolved,
        options=options,
        output=output,
        force=force,
        hf_config=hf_config,
        architecture=architecture,
        plan=plan,
        stored_dtype=DTYPES.get(checkpoint_dtype(hf_config), torch.float32),
        source=_source(files, plan),
    )


def run(job: Job, progress: Progress) -> Converted:
    """Convert, and write the directory with its report."""
    resolved, options = job.resolved, job.options
    texts = _texts(job)
    walk = _walk(job)
    with new_directory(job.output, force=job.force) as directory:
        conversion = convert(
            walk,
            resolved.files,
            job.hf_config,
            resolved.decoder,
            job.plan,
            options,
            texts,
            directory,
            stored_dtype=job.stored_dtype,
            device=walk.device,
            progress=progress,
        )
        write_json(directory / REPORT, _report(job, conversion))
    return Converted(conversion=conversion)


def merge_adapter(
    config: EngineConfig,
    adapter: str,
    output: Path,
    *,
    force: bool,
    home: Path,
    progress: Progress,
) -> Merged:
    """Write the model with an adapter merged into its weights. StartupError if that cannot be.

    adapter  a folder, a catalogue name, or a hub repository"""
    check_target(output, force=force)
    config = replace(config, model=replace(config.model, model_impl=SAPWOOD))
    resolved = resolve_config(config, home=home, progress=progress)
    files = resolved.files
    hf_config = read_json(files.path / "config.json")
    if hf_config.get("quantization_config") or files.weight_format == "none":
        raise ConfigError(
            f"{files.name} is quantised, or has no weights; merge the adapter into the model's "
            "unquantised checkpoint"
        )
    store = open_store(home)
    folder = store.adapter(adapter, offline=config.model.offline, progress=progress)
    with new_directory(output, force=force) as directory:
        return merge(
            files,
            hf_config,
            resolved.decoder,
            read_tensors(folder),
            read_config(folder),
            directory,
            source=adapter,
            stored_dtype=DTYPES.get(checkpoint_dtype(hf_config), torch.float32),
            progress=progress,
        )


def _source(files: ModelFiles, plan: Plan) -> Source | None:
    """How a GGUF file holds the weights that are converted; None if they are not quantised."""
    if files.weight_format != "gguf":
        return None
    counts: Counter[str] = Counter()
    num_bytes = num_numbers = 0
    for stored in stored_tensors(files):
        if stored.name.removesuffix(".weight") in plan.converted:
            counts[stored.type] += 1
            num_bytes += stored.num_bytes
            num_numbers += stored.numbers
    quantized = [name for name, _ in counts.most_common() if name not in PLAIN_TYPES]
    if not quantized:
        return None
    return Source(types=", ".join(quantized), bits=8 * num_bytes / num_numbers)


def estimate(job: Job) -> float:
    """Seconds that `run` will take about; it is less where a text is short."""
    options = job.options
    calibration_tokens = 0
    if options.needs_calibration:
        calibration_tokens = options.calibration_tokens or DEFAULT_CALIBRATION_TOKENS
    return estimate_s(
        _walk(job),
        job.plan,
        options,
        job.resolved.decoder,
        calibration_windows=calibration_tokens // options.window,
        measured_windows=options.scored_tokens // options.window,
    )


def _walk(job: Job) -> Walk:
    config, kernels = job.resolved.config, job.resolved.kernels.kernels
    device = job.resolved.device
    if device.type == "cpu":
        torch.set_num_threads(config.execution.num_threads)
        kernels.set_num_threads(config.execution.num_threads)
    build = Build(kernels=kernels, device=device, dtype=job.resolved.dtype)
    return Walk(
        job.architecture(job.resolved.decoder, build),
        window=job.options.window,
        page_size=config.memory.page_size,
    )


def _texts(job: Job) -> Texts:
    options, files = job.options, job.resolved.files
    if not options.needs_calibration and not options.scored_tokens:
        return Texts(calibration=(), measured=())
    tokenizer = Tokenizer.from_directory(files.path)

    def windows(
        flag: str, path: str | None, default: Callable[[], str], num_tokens: int, spread: bool
    ) -> list[torch.Tensor]:
        text = default() if path is None else _read_text(flag, path)
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        return cut(token_ids, window=options.window, num_tokens=num_tokens, spread=spread)

    calibration: list[torch.Tensor] = []
    if options.needs_calibration:
        num_tokens = options.calibration_tokens or DEFAULT_CALIBRATION_TOKENS
        calibration = windows(
            "--calibration-file", options.calibration_file, package_text, num_tokens, True
        )
    measured: list[torch.Tensor] = []
    if options.scored_tokens:
        measured = windows(
            "--text-file", options.text_file, library_text, options.scored_tokens, False
        )
    return Texts(calibration=calibration, measured=measured)


def _read_text(flag: str, name: str) -> str:
    path = Path(name).expanduser()
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {flag} {path}: {error}") from error


def _report(job: Job, conversion: Conversion) -> dict[str, Any]:
    return {
        "kind": "conversion",
        "model": job.resolved.files.name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("sapwood", "torch")},
        "options": asdict(job.options),
        "computed_in": job.resolved.config.model.dtype,
        "ignored": list(job.plan.ignored),
        **asdict(conversion),
    }


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
