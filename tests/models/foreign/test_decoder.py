"""Models that transformers computes over paged attention: the logits of transformers alone, and of
sapwood's own classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sapwood.base.errors import WeightError
from sapwood.kernels.interface import Kernels
from sapwood.kernels.recording import CannotRecord
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.forward_batch import InputEmbeds
from sapwood.models.foreign.decoder import ForeignDecoder
from sapwood.models.foreign.structure import ForeignConfig, read_foreign
from sapwood.models.registry import ARCHITECTURES
from tests.models.lm.cases import CASES, WINDOW
from tests.models.lm.checks import ATOL, CHECKS
from tests.models.lm.harness import (
    CPU,
    NewTokens,
    Session,
    make_batch,
    make_decoder,
    make_kv_caches,
)
from tests.models.lm.peer import SIZES, Peer, make_peer, random_text
from tests.models.lm.test_architectures import native_or_skip
from tests.tiers import sweep

LATENT = {
    "num_key_value_heads": 6,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
OWN = ("qwen2, window in one layer", "gemma2", "gpt_oss", "mixtral")
"""Of the registry: windows in some layers, soft caps, sinks, experts in many tensors."""
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{case: CASES[case] for case in OWN},
    "nanochat": ("nanochat", "NanoChatForCausalLM", {}),
    "vaultgemma": (
        "vaultgemma",
        "VaultGemmaForCausalLM",
        {"sliding_window": WINDOW, "head_dim": 8, "attn_logit_softcapping": 2.0}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "youtu, values smaller than keys": ("youtu", "YoutuForCausalLM", LATENT),
    "youtu, values larger than keys": (
        "youtu",
        "YoutuForCausalLM",
        LATENT | {"v_head_dim": 24, "q_lora_rank": None},
    ),
}
SMALL = {
    "num_key_value_heads": 6,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    **{name: size for name, size in LATENT.items() if name != "num_key_value_heads"},
}
LARGEST = 30_000_000
"""Parameters of a class whose own sizes are tried beside SMALL."""
NATIVE = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""Sizes of heads that the C++ kernels have."""

Saved = Callable[[str], tuple[Peer, Path]]


@cache
def peer_of(case: str) -> Peer:
    model_type, architecture, fields = MODELS[case]
    return make_peer(model_type, architecture, **fields)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The peer of a case, and its directory as transformers writes it."""

    @cache
    def save(case: str) -> tuple[Peer, Path]:
        directory = tmp_path_factory.mktemp("saved")
        peer_of(case).model.save_pretrained(directory)
        return peer_of(case), directory

    return save


def load(directory: Path, kernels: Kernels | None = None, **fields: Any) -> ForeignDecoder:
    config = facts_of(directory)
    return ForeignDecoder.load(
        directory, config, kernels or TorchKernels(), device=CPU, dtype=torch.float32, **fields
    )


def facts_of(directory: Path) -> ForeignConfig:
    hf_config = json.loads((directory / "config.json").read_text())
    return read_foreign(directory, hf_config, trust_remote_code=False)


@sweep(case=[*MODELS], check=[*CHECKS])
def test_logits_equal_transformers(saved: Saved, case: str, check: str) -> None:
    peer, directory = saved(case)
    CHECKS[check](Session(load(directory)), peer)


@pytest.mark.parametrize("case", OWN)
def test_both_ways_give_the_same_logits(saved: Saved, case: str) -> None:
    peer, directory = saved(case)
    text = random_text(60)
    own = make_decoder(peer.hf_config, peer.weights, TorchKernels())
    torch.testing.assert_close(
        Session(load(directory)).in_chunks("a", text, 7),
        Session(own).in_chunks("a", text, 7),
        atol=ATOL,
        rtol=0,
    )
    theirs = facts_of(directory)
    assert theirs.cache_groups == own.config.cache_groups
    assert theirs.has_sinks == own.config.has_sinks
    assert theirs.soft_cap == own.config.soft_cap


def test_native_kernels_compute_the_attention(tmp_path: Path) -> None:
    kernels = native_or_skip()
    peer = make_peer("nanochat", "NanoChatForCausalLM", **NATIVE)
    peer.model.save_pretrained(tmp_path)
    for check in CHECKS.values():
        check(Session(load(tmp_path, kernels)), peer)


def test_facts_are_those_that_layers_ask_for(saved: Saved) -> None:
    _, directory = saved("vaultgemma")
    config = facts_of(directory)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, 6, 2)
    assert (config.head_dim, config.sliding_window, config.windowed_layers) == (8, WINDOW, (0,))
    assert config.context_length == config.max_context_length == 256
    _, directory = saved("youtu, values smaller than keys")
    config = facts_of(directory)
    assert (config.num_kv_heads, config.head_dim) == (6, 16)
    assert config.num_parameters == sum(
        one.numel() for one in peer_of("youtu, values smaller than keys").model.parameters()
    )
    assert "NanoChatForCausalLM" not in ARCHITECTURES.names()


def test_hidden_states_and_vectors(saved: Saved) -> None:
    peer, directory = saved("nanochat")
    model, text = load(directory), random_text(12)
    caches = make_kv_caches(model.config, num_pages=4, page_size=8)
    batch = make_batch([NewTokens(text, 0, (1, 2))], caches)
    output = peer.model(torch.tensor([text]), use_cache=False, output_hidden_states=True)
    hidden = model.forward(batch)
    torch.testing.assert_close(hidden, output.hidden_states[-1][0], atol=ATOL, rtol=0)
    torch.testing.assert_close(model.logits(hidden[3:5]), output.logits[0, 3:5], atol=ATOL, rtol=0)
    vectors = peer.model.get_input_embeddings()(torch.tensor(text[:5]))
    blanks = make_batch([NewTokens([0] * 5 + text[5:], 0, (1, 2))], caches)
    object.__setattr__(blanks, "embeds", InputEmbeds(torch.arange(5), vectors))
    torch.testing.assert_close(model.forward(blanks), hidden, atol=1e-6, rtol=0)
    with pytest.raises(CannotRecord, match="transformers computes"):
        model.program()


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    peer = make_peer("nanochat", "NanoChatForCausalLM", tie_word_embeddings=True)
    peer.model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load(tmp_path)
    CHECKS["at once"](Session(model), peer)
    vocab = model.config.vocab_size * model.config.hidden_size
    untied = make_peer("nanochat", "NanoChatForCausalLM", tie_word_embeddings=False)
    assert model.config.num_parameters + vocab == sum(
        one.numel() for one in untied.model.parameters()
    )


def test_wrong_weights_are_refused_by_name(saved: Saved, tmp_path: Path) -> None:
    _, directory = saved("nanochat")
    weights = load_file(directory / "model.safetensors")
    lost, cut = "model.layers.1.mlp.fc2.weight", "model.layers.0.mlp.fc1.weight"
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    del weights[lost]
    weights[cut] = weights[cut][:-1].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightError) as caught:
        load(tmp_path)
    assert f"1 missing: {lost}" in caught.value.message
    assert f"1 of the wrong shape: {cut}" in caught.value.message


def test_random_weights(saved: Saved) -> None:
    _, directory = saved("nanochat")
    text = random_text(9)
    first, second = (Session(load(directory, is_random=True)).step({"a": text}) for _ in range(2))
    assert torch.equal(first["a"], second["a"])
    assert first["a"].std() > 0


@pytest.mark.long
def test_no_class_of_transformers_gives_wrong_logits(tmp_path: Path) -> None:
    """Each of its language models is refused, or equal. Those are left out that transformers
    itself does not build, or does not compute, with these sizes."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    equal, wrong = [], []
    for model_type, named in KNOWN.items():
        architecture = named if isinstance(named, str) else named[0]
        directory = tmp_path / model_type
        directory.mkdir()
        try:
            config = AutoConfig.for_model(model_type, **SIZES | SMALL).to_dict()
            config |= {"architectures": [architecture]}
            (directory / "config.json").write_text(json.dumps(config, default=str))
            if facts_of(directory).num_parameters > LARGEST:
                continue
            peer = make_peer(model_type, architecture, **SMALL)
            peer.logits([1, 2, 3])
            peer.model.save_pretrained(directory)
            found = load(directory)
        except Exception:  # noqa: BLE001 - whatever a class says of these sizes, or a refusal
            continue
        try:
            for check in ("at once", "chunks of 7", "prefix hit", "beside others"):
                CHECKS[check](Session(found), peer)
            equal.append(architecture)
        except AssertionError as error:
            wrong.append(f"{architecture}: {error}")
    assert not wrong
    assert len(equal) > 60
