"""Tiny LoRA adapters, written and computed by peft."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sapwood.kernels.low_rank import LowRank
from sapwood.layers.adapters import AdapterSite, AdapterTarget

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

OPTIONS: dict[str, dict[str, Any]] = {
    "queries": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 8, "lora_alpha": 4, "target_modules": "all-linear"},
    "rslora": {"r": 3, "lora_alpha": 6, "use_rslora": True, "target_modules": ATTENTION},
    "patterns": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": [*ATTENTION, *MLP],
        "rank_pattern": {"layers.0.self_attn.q_proj": 7, "down_proj": 5},
        "alpha_pattern": {"layers.1.mlp.up_proj": 11, "k_proj": 3},
    },
    "one layer": {
        "r": 16,
        "lora_alpha": 16,
        "target_modules": MLP,
        "layers_to_transform": [1],
    },
    "a regex": {"r": 1, "lora_alpha": 1, "target_modules": r".*layers\.0\.mlp\.(up|down)_proj"},
    "without keys": {
        "r": 4,
        "lora_alpha": 9,
        "target_modules": ATTENTION,
        "exclude_modules": ["k_proj"],
    },
}
"""Of `LoraConfig`, by what is special of them."""

VOCABULARY: dict[str, dict[str, Any]] = {
    "layers": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
    "embedding": {"r": 5, "lora_alpha": 3, "target_modules": ["embed_tokens", "v_proj"]},
    "output": {"r": 3, "lora_alpha": 9, "target_modules": ["lm_head"]},
    "both": {
        "r": 4,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": ["embed_tokens", "lm_head", "q_proj"],
        "rank_pattern": {"lm_head": 6},
        "alpha_pattern": {"embed_tokens": 2},
    },
    "saved output": {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["up_proj"],
        "modules_to_save": ["lm_head"],
    },
    "saved both": {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["k_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "output beside a saved embedding": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["lm_head"],
        "modules_to_save": ["embed_tokens"],
    },
}
"""Those of the layers with a row per token."""

INVOCATION = [7, 3, 7]

ACTIVATED: dict[str, dict[str, Any]] = {
    "activated": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "alora_invocation_tokens": INVOCATION,
    },
    "with outputs": {
        "r": 3,
        "lora_alpha": 9,
        "target_modules": [*ATTENTION, "lm_head"],
        "alora_invocation_tokens": INVOCATION[:1],
    },
    "plain": {"r": 2, "lora_alpha": 5, "target_modules": [*ATTENTION, *MLP]},
}
"""Those that begin in the middle of a prompt, and one that does not."""


def write_adapter(directory: Path, rank: int) -> None:
    """Of the first and the last products of attention in two layers of `llama_config`, without
    peft; changes most outputs."""
    directory.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4 * rank}
    (directory / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": ["q_proj", "o_proj"]})
    )
    generator = torch.Generator().manual_seed(rank)
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{part}.weight": (
            0.2 * torch.randn(shape, generator=generator)
        )
        for layer in (0, 1)
        for name in ("q_proj", "o_proj")
        for part, shape in (("A", (rank, 64)), ("B", (64, rank)))
    }
    save_file(tensors, directory / "adapter_model.safetensors")


def random_adapter(
    targets: Mapping[str, AdapterTarget],
    rank: int,
    *,
    ending: str = "",
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> dict[AdapterSite, LowRank]:
    """On all layers whose names end so, without peft."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[AdapterSite, list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
    for path, target in targets.items():
        if path.endswith(ending):
            outputs, inputs = target.shape
            a = torch.randn(rank, inputs, generator=generator) * 0.2
            b = torch.randn(outputs, rank, generator=generator) * 0.2
            parts[target.site].append(target.part(a, b))
    return {site: LowRank.of(found, dtype) for site, found in parts.items()}


LogProbs = Callable[[str, list[int]], torch.Tensor]


def save_adapters(
    model_path: Path,
    folder: Path,
    options: dict[str, dict[str, Any]] | None = None,
    *,
    size: float = 0.2,
) -> tuple[dict[str, Path], LogProbs]:
    """Adapters with random numbers in `folder`, and log probabilities by peft.

    size     standard deviation of the numbers
    Returns  (their folders by name, a function from the name of an adapter, or "", and token ids
             [T] to [T, vocab])
    """
    from transformers import AutoModelForCausalLM

    chosen = OPTIONS if options is None else options
    paths = {name: folder / name.replace(" ", "-") for name in chosen}
    models: dict[str, Any] = {}
    for number, (name, fields) in enumerate(chosen.items()):
        models[name] = _saved(model_path, paths[name], fields, number, size)
    models[""] = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def log_probs(name: str, token_ids: list[int]) -> torch.Tensor:
        return models[name](torch.tensor([token_ids])).logits[0].double().log_softmax(-1)

    return paths, log_probs


def _saved(model_path: Path, folder: Path, fields: dict[str, Any], seed: int, size: float) -> Any:
    """A random adapter, written to the folder and read again; returns the model with it."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 with newer transformers
        # It says that it saves embeddings, and that a tied weight cannot be merged.
        warnings.simplefilter("ignore", UserWarning)
        from peft import LoraConfig, PeftModel, get_peft_model

        base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **fields))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "modules_to_save" in key:
                    noise = torch.randn(weight.shape, generator=generator)
                    weight.copy_(weight + 0.5 * weight.std() * noise)
                elif "lora_" in key:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * size)
        model.save_pretrained(folder)
        fresh = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        return PeftModel.from_pretrained(fresh, folder).eval()
