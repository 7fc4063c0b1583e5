"""Checkpoints with several layers that predict further tokens, of which each makes one guess."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sapwood.app.building.draft_model import DraftKind, FoundDraft
from sapwood.base.errors import ConfigError
from sapwood.models.registry import decoder_class, read_decoder
from sapwood.schema.config.engine import EngineConfig
from sapwood.store import ModelFiles
from tests.app.building.test_speculation import PROMPTS, SAME, ask, check_figures
from tests.app.llms import Make, llms_of
from tests.models.drafts.reference import norm, num_steps
from tests.models.lm.cases import CASES
from tests.models.lm.peer import Peer, make_peer
from tests.tiny import VOCAB, write_tokenizer

NUM_LAYERS, NUM_HEADS, SIZE, WINDOW = 3, 3, 48, 6
KINDS = ["full_attention", "sliding_attention", "sliding_attention"]
ADDING = ("o_proj", "down_proj")
NAMES = ("to the end", "seeds", "grammar", "stop token", "logprobs", "n samples")
EAGLE = {
    "speculative_algorithm": "EAGLE",
    "enable_multi_layer_eagle": True,
    "disable_speculative_adaptation": True,
}


@dataclass(frozen=True)
class Checkpoint:
    """A MiMo-V2-Flash whose next token depends mostly on the last one, and heads that know that.

    peer     transformers' model, of which the last layers are the heads' blocks
    weights  as the file names them
    """

    path: Path
    peer: Peer
    weights: dict[str, Tensor]

    @torch.inference_mode()
    def guess(self, tokens: Sequence[int], count: int) -> list[list[int]]:
        """The first 1, 2, … guesses of what follows `tokens`; all places at once."""
        model, taken = self.peer.model.model, list[Tensor]()
        hook = model.norm.register_forward_pre_hook(lambda _, given: taken.append(given[0]))
        model(torch.tensor([tokens[:-1]]))
        hook.remove()
        states, known = taken[0][0], list(tokens)
        for head in range(count):
            following = torch.tensor(known[1 + head :])
            hidden = self._head(head, model.embed_tokens(following), states)
            known.append(int(self.peer.model.lm_head(hidden[-1:])[0].argmax()))
        guessed = known[len(tokens) :]
        return [guessed[: 1 + at] for at in range(count)]

    def _head(self, head: int, embeds: Tensor, states: Tensor) -> Tensor:
        def of(name: str) -> Tensor:
            return self.weights[f"model.mtp.layers.{head}.{name}.weight"]

        halves = (norm(embeds, of("enorm"), 1e-5), norm(states, of("hnorm"), 1e-5))
        x = (torch.cat(halves, -1) @ of("eh_proj").T)[None]
        places = torch.arange(len(states))
        distance = places[:, None] - places[None]
        unseen = (distance < 0) | (distance >= WINDOW)
        model = self.peer.model.model
        x = model.layers[NUM_LAYERS + head](
            x,
            attention_mask=torch.zeros(unseen.shape).masked_fill(unseen, -torch.inf)[None, None],
            position_ids=places[None],
            position_embeddings=model.rotary_emb(x, places[None], "sliding_attention"),
        )
        return norm(x[0], of("final_layernorm"), 1e-5)


def write(directory: Path, *, adding: float, wrong_head: int | None = None) -> Checkpoint:
    """adding: factor of what layers add; wrong_head: one that takes the opposite of embeddings"""
    model_type, architecture, fields = CASES["mimo_v2_flash"]
    fields = fields | {
        "vocab_size": VOCAB,
        "head_dim": 32,
        "num_hidden_layers": NUM_LAYERS + NUM_HEADS,
        "sliding_window": WINDOW,
        "layer_types": [*KINDS, *["sliding_attention"] * NUM_HEADS],
        "mlp_layer_types": ["dense", "sparse", "sparse", *["dense"] * NUM_HEADS],
        "rms_norm_eps": 1e-5,
    }
    peer = make_peer(model_type, architecture, **fields)
    state = peer.model.state_dict()
    for name, one in state.items():
        if any(part in name for part in ADDING):
            one *= adding
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            one *= SIZE**0.5
    weights = {
        name: one * (adding if any(part in name for part in ADDING) else 1.0)
        for name, one in peer.weights.items()
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = state[name].clone()
    one = torch.eye(SIZE)
    for head in range(NUM_HEADS):
        block, name = f"model.layers.{NUM_LAYERS + head}.", f"model.mtp.layers.{head}."
        for key in [key for key in weights if key.startswith(block)]:
            renamed = key.replace(block, name).replace("post_attention", "pre_mlp")
            weights[renamed] = weights.pop(key)
        sign = -1.0 if head == wrong_head else 1.0
        weights[f"{name}eh_proj.weight"] = torch.cat((sign * one, adding * one), 1)
        for part in ("enorm", "hnorm"):
            weights[f"{name}{part}.weight"] = torch.ones(SIZE)
        weights[f"{name}final_layernorm.weight"] = weights["model.norm.weight"].clone()
    peer.model.config.num_hidden_layers = NUM_LAYERS
    fields = {
        **peer.hf_config,
        "num_hidden_layers": NUM_LAYERS,
        "layer_types": KINDS,
        "mlp_layer_types": peer.hf_config["mlp_layer_types"][:NUM_LAYERS],
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    save_file({name: one.clone() for name, one in weights.items()}, directory / "model.safetensors")
    write_tokenizer(directory)
    return Checkpoint(directory, peer, weights)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write(tmp_path_factory.mktemp("models") / "several", adding=0.2)


@pytest.fixture
def make(checkpoint: Checkpoint) -> Iterator[Make]:
    with llms_of(checkpoint.path, page_size=4, enable_return_hidden_states=True) as make:
        yield make


@pytest.mark.parametrize(("prompts", "chunk"), [(PROMPTS, 512), ([list(range(60, 97))], 5)])
def test_each_head_makes_the_guess_that_its_mathematics_says(
    make: Make,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    prompts: list[list[int]],
    chunk: int,
) -> None:
    monkeypatch.setattr("tests.app.building.test_speculation.PROMPTS", prompts)
    llm = make(**EAGLE, chunked_prefill_size=chunk)
    accepted = 0
    for prompt, sample in zip(prompts, ask(llm, ignore_eos=True, max_new_tokens=24), strict=True):
        steps, right = num_steps(prompt, sample.token_ids, checkpoint.guess, NUM_HEADS)
        assert sample.speculated is not None
        assert (sample.speculated.num_steps, sample.speculated.num_accepted) == (steps, right)
        accepted += right
    assert accepted > 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_total_tokens": 96, "schedule_conservativeness": 0.0},
        {"disable_speculative_adaptation": False, "overlap_depth": 2},
    ],
    ids=["one step at a time", "retractions", "adaptive"],
)
def test_no_output_changes(make: Make, options: dict[str, Any]) -> None:
    plain, guessing = make(), make(**{**EAGLE, **options})
    for name in NAMES:
        asked = SAME[name]
        for got, wanted in zip(ask(guessing, **asked), ask(plain, **asked), strict=True):
            assert got.token_ids == wanted.token_ids, name
            assert got.finish == wanted.finish, name
            check_figures(got, wanted, atol=1e-4)
    stats = guessing.stats()
    assert stats.num_leased_pages == stats.num_running == stats.num_waiting == 0


@pytest.mark.parametrize(("wrong_head", "brought"), [(None, 4), (0, 1), (1, 2), (2, 3)])
def test_heads_that_are_perfect_are_right_as_far_as_none_is_wrong(
    tmp_path: Path, wrong_head: int | None, brought: int
) -> None:
    """Where no layer adds anything, a head that hands the embedding on knows the next token."""
    flat = write(tmp_path / "flat", adding=0.0, wrong_head=wrong_head)
    with llms_of(flat.path, page_size=4) as make:
        samples = ask(make(**EAGLE), ignore_eos=True, max_new_tokens=13)
    for sample in samples:
        assert sample.speculated is not None
        assert sample.speculated.num_steps == 1 + 12 // brought


def test_pages_stay_for_places_that_are_behind_the_model(checkpoint: Checkpoint) -> None:
    config = read_decoder(json.loads((checkpoint.path / "config.json").read_text()))
    shape = decoder_class(config.architecture).with_predictors(config)
    assert shape is not None
    found = FoundDraft(
        kind=DraftKind.OWN,
        asked=EngineConfig(),
        files=ModelFiles(name="several", path=checkpoint.path, weights=(), weight_format="none"),
        shape=shape,
        dtype="float32",
        num_bytes=1,
        has_several=True,
    )
    [group] = found.cache_groups(config, 256)
    assert (group.layers, group.window) == ((3, 4, 5), WINDOW + NUM_HEADS - 1)


def test_options_that_do_not_fit_are_named(make: Make, checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="has 3 layers that each make one guess"):
        make(**EAGLE, speculative_num_steps=4)
    with pytest.raises(ConfigError, match="leave out one of the two"):
        make(**EAGLE, speculative_eagle_topk=2)
    with pytest.raises(ConfigError, match="about layers of the model's own checkpoint"):
        make(**EAGLE, speculative_draft_model_path="elsewhere")
