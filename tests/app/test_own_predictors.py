"""Models whose checkpoints predict further tokens in other ways than by one usual layer, served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.app.building.test_speculation import PROMPTS, ask
from tests.app.llms import llms_of
from tests.models.drafts.test_predictors import PREDICTORS, extras_of, served_beside
from tests.tiny import VOCAB, write_tokenizer

NUM_STEPS = 3
ADDING = ("o_proj", "down_proj", "out_proj")
"""In the names of the weights that make what a layer adds."""


@pytest.mark.parametrize("name", ["Nemotron H", "LongCat", "DeepSeek V3.2"])
def test_a_predictor_that_is_perfect_is_always_right(name: str, tmp_path: Path) -> None:
    """Where no layer adds anything, one that hands the embedding on knows the next token."""
    predictor, size = PREDICTORS[name], 48
    others = {"zero_expert_num": 0, "moe_topk": 3} if name == "LongCat" else {}
    peer, served = served_beside(predictor, vocab_size=VOCAB, **others)
    index = predictor.layer % len(peer.model.model.layers)
    extras = extras_of(predictor, size, served)
    weights = {**peer.weights, **predictor.block_weights(peer, index), **extras}
    own = next(key for key in ("model.norm.weight", "model.norm_f.weight") if key in weights)
    one, none = torch.eye(size), torch.zeros(size, size)
    weights |= {
        f"{predictor.projection}.weight": torch.cat((one, none), 1),
        f"{predictor.embedding_norm}.weight": torch.ones(size),
        f"{predictor.norm}.weight": weights[own],
    }
    for key, tensor in weights.items():
        adds = any(part in key for part in ADDING)
        weights[key] = torch.zeros_like(tensor) if adds else tensor.clone()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(served))
    write_tokenizer(tmp_path)
    options = {
        "speculative_algorithm": "NEXTN",
        "disable_speculative_adaptation": True,
        "speculative_num_steps": NUM_STEPS,
    }
    count = 2 * (NUM_STEPS + 1) + 1
    with llms_of(tmp_path, page_size=4) as make:
        plain, guessing = (
            ask(make(**more), ignore_eos=True, max_new_tokens=count) for more in ({}, options)
        )
    assert len(plain) == len(guessing) == len(PROMPTS)
    for wanted, got in zip(plain, guessing, strict=True):
        assert got.token_ids == wanted.token_ids
        assert got.speculated is not None
        assert got.speculated.num_steps == 3
        assert got.speculated.num_accepted == got.speculated.num_drafted == 2 * NUM_STEPS
