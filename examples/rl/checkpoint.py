"""A model as a folder that a trainer can read: config, tokenizer, and safetensors in bfloat16."""

from __future__ import annotations

import shutil
from pathlib import Path

import safetensors.torch
import torch

from sapwood.models.loader.weights import iterate_weights
from sapwood.schema.env import environment, home
from sapwood.store import fetch_model

TOKENIZER = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def write_checkpoint(model: str, folder: Path) -> Path:
    """model: a catalogue name, a hub repository or a path; also of a GGUF file"""
    files = fetch_model(model, home=home(environment()))
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        if (files.path / name).exists():
            shutil.copy(files.path / name, folder / name)
    tensors = {
        name: tensor.contiguous() for name, tensor in iterate_weights(files, dtype=torch.bfloat16)
    }
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
