"""`sapwood bench perplexity`, after its options are parsed."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sapwood.app.building.loaded_models import load_model
from sapwood.app.building.resolving import resolve_config
from sapwood.base.errors import ConfigError
from sapwood.bench.environment import describe_environment
from sapwood.bench.evals.options import PerplexityOptions
from sapwood.bench.evals.perplexity import (
    Perplexity,
    WindowScorer,
    measure,
)
from sapwood.bench.report import report_stem, write_json
from sapwood.schema.config.engine import EngineConfig
from sapwood.store import Progress
from sapwood.text.standard_library import library_text
from sapwood.text.tokenizer import Tokenizer


def bench_perplexity(
    config: EngineConfig,
    options: PerplexityOptions,
    console: Console,
    *,
    home: Path,
    progress: Progress | None = None,
) -> Perplexity:
    """Load the model of `config`, score the text, show and write the result."""
    text = _text(options)
    environment = describe_environment()
    console.print(str(environment), markup=False, soft_wrap=True)
    resolved = resolve_config(config, home=home, progress=progress)
    for decision in resolved.decisions:
        console.print(f"  {decision}", markup=False, soft_wrap=True)
    model_config = resolved.config.model
    context_length = model_config.context_length
    if options.window > context_length:
        raise ConfigError(
            f"--window is {options.window} but the model's context is {context_length} tokens"
        )
    model, device = load_model(resolved), resolved.device
    if device.type == "cpu":
        resolved.kernels.kernels.set_num_threads(resolved.config.execution.num_threads)
    score = WindowScorer(
        model,
        resolved.decoder,
        window=options.window,
        page_size=resolved.config.memory.page_size,
        device=device,
        kv_cache_dtype=resolved.config.memory.kv_cache_dtype,
        dtype=model_config.dtype,
    )
    tokenizer = Tokenizer.from_directory(model_config.tokenizer_path or resolved.files.path)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    start = time.perf_counter()
    found = measure(score, token_ids, window=options.window, num_tokens=options.num_text_tokens)
    seconds = time.perf_counter() - start
    console.print(_table(found, model_config.quantization or model_config.dtype, seconds))
    stem = report_stem("perplexity", [model_config.quantization or model_config.dtype], environment)
    path = Path(options.output_dir).expanduser() / f"{stem}.json"
    content = {
        "kind": "perplexity",
        "environment": environment,
        "options": {**asdict(options), "engine": asdict(resolved.config)},
        "num_tokens": found.num_tokens,
        "negative_log_likelihood": found.negative_log_likelihood,
        "perplexity": found.perplexity,
        "seconds": seconds,
    }
    write_json(path, content)
    console.print(f"wrote {path}", markup=False, soft_wrap=True)
    return found


def _text(options: PerplexityOptions) -> str:
    if options.text_file is None:
        return library_text()
    path = Path(options.text_file).expanduser()
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --text-file {path}: {error}") from error


def _table(found: Perplexity, weights: str, seconds: float) -> Table:
    table = Table()
    for name in ("weights", "tokens scored", "nats per token", "perplexity", "seconds"):
        table.add_column(name, justify="left" if name == "weights" else "right")
    table.add_row(
        weights,
        str(found.num_tokens),
        f"{found.negative_log_likelihood:.5f}",
        f"{found.perplexity:.4f}",
        f"{seconds:.1f}",
    )
    return table
