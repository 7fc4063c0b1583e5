"""A checkpoint that every peer can read: a GGUF file becomes safetensors once, and is kept.

Comparing at equal precision needs equal weights: all peers load the converted checkpoint.
`python -m sapwood.bench.peers.conversion GGUF DIRECTORY DTYPE` does the work in its own process,
so that the comparison itself never loads torch.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sapwood.base.errors import ModelSourceError
from sapwood.store import ModelFiles, Progress
from sapwood.store.cache import publish, safe_key, staging
from sapwood.store.progress import stage

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""The tokenizer's files, which are copied from sapwood's own preparation of the GGUF."""


def checkpoint_directory(
    files: ModelFiles, *, home: Path, dtype: str, env: Mapping[str, str], progress: Progress
) -> Path:
    """A transformers checkpoint of the model, which is converted if it has another format.

    Raises ModelSourceError if there are no weights, or transformers cannot read the GGUF file.
    """
    if files.weight_format == "none":
        raise ModelSourceError(f"{files.name} has no weights to compare with")
    if files.weight_format != "gguf":
        return files.path
    if len(files.weights) > 1:
        raise ModelSourceError(
            f"{files.name} is a GGUF in {len(files.weights)} parts, which transformers cannot read;"
            " merge them, or name a safetensors checkpoint of the model"
        )
    # The prepared directory is named after the GGUF's content or place, so its name is unique.
    key = safe_key(f"{files.path.name}-{dtype}")
    target = home / "bench" / "converted" / key
    if target.is_dir():
        return target
    with staging(home, f"converted-{key}", progress) as directory:
        if not target.is_dir():
            staged = directory / "checkpoint"
            with stage(progress, f"converting {files.weights[0].name} to {dtype}", None):
                _convert_in_process(files.weights[0], staged, dtype, env)
            for name in TOKENIZER_FILES:
                if (files.path / name).is_file():
                    shutil.copy(files.path / name, staged / name)
            publish(staged, target)
    return target


def _convert_in_process(gguf: Path, target: Path, dtype: str, env: Mapping[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(gguf), str(target), dtype],
        capture_output=True,
        text=True,
        env=dict(env),
        check=False,
    )
    if done.returncode != 0:
        raise ModelSourceError(
            f"transformers could not convert {gguf}; its log ends:\n{done.stderr.strip()[-2000:]}"
        )


def convert(gguf: Path, target: Path, dtype: str) -> None:
    """Write config and weights. transformers needs accelerate to read GGUF files."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "gguf_file": gguf.name}
    # Newer versions keep the weights packed, and such a model cannot be saved; older ones always
    # unpack, and do not know this option.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), **options)
    model.save_pretrained(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
