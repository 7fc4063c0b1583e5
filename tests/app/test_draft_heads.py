"""Heads that go on from the model's states: they guess what their mathematics says, and change no
output."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sapwood import LLM
from sapwood.base.errors import ConfigError
from tests.app.building.test_speculation import PROMPTS, ask
from tests.app.test_drafting import llms
from tests.models.drafts import reference
from tests.models.drafts.reference import Sizes
from tests.tiny import VOCAB, llama_config, write_tokenizer

Make = Callable[..., LLM]
Embed = Callable[[Tensor], Tensor]
HIDDEN, SIZES, NUM_STEPS, NUM_LAYERS = 64, Sizes(), 3, 4
CAPTURED = [1, 2, 3]
KNOWN = [token_id for token_id in range(256) if token_id % 5]
"""Tokens that the EAGLE-3 head knows, and a list of hot ones: not all, so that some guesses are
wrong."""


def layer_of(name: str, generator: torch.Generator, width: int = HIDDEN) -> dict[str, Tensor]:
    """A layer that changes hidden states a little."""

    def random(rows: int, columns: int) -> Tensor:
        return 0.3 * torch.randn(rows, columns, generator=generator) * columns**-0.5

    return {
        f"{name}.self_attn.q_proj.weight": 4 * random(64, width),
        f"{name}.self_attn.k_proj.weight": 4 * random(32, width),
        f"{name}.self_attn.v_proj.weight": 4 * random(32, width),
        f"{name}.self_attn.o_proj.weight": random(HIDDEN, 64),
        f"{name}.mlp.gate_proj.weight": 3 * random(96, HIDDEN),
        f"{name}.mlp.up_proj.weight": 3 * random(96, HIDDEN),
        f"{name}.mlp.down_proj.weight": random(HIDDEN, 96),
        f"{name}.input_layernorm.weight": torch.ones(HIDDEN),
        f"{name}.post_attention_layernorm.weight": torch.ones(HIDDEN),
    }


def write(directory: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(
        {name: one.contiguous() for name, one in weights.items()}, directory / "model.safetensors"
    )
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("heads"))


def write_models(directory: Path) -> Path:
    """A model whose next token depends mostly on the last one, and heads that know that."""
    generator = torch.Generator().manual_seed(2)
    embedding = torch.randn(VOCAB, HIDDEN, generator=generator)
    weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": torch.randn(VOCAB, HIDDEN, generator=generator),
    }
    for index in range(NUM_LAYERS):
        weights |= layer_of(f"model.layers.{index}", generator)
    config = llama_config(num_hidden_layers=NUM_LAYERS)
    write(directory / "model", config, weights)
    one, half = torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)
    eagle = layer_of("layers.0", generator)
    del eagle["layers.0.input_layernorm.weight"]
    eagle |= {"fc.weight": torch.cat((one, 0.05 * one), 1), "fc.bias": torch.zeros(HIDDEN)}
    eagle["embed_tokens.weight"] = embedding
    of_head = {**config, "num_hidden_layers": 1}
    write(directory / "eagle", {**of_head, "architectures": ["LlamaForCausalLMEagle"]}, eagle)
    eagle3 = layer_of("midlayer", generator, 2 * HIDDEN)
    eagle3["midlayer.input_layernorm.weight"] = torch.ones(HIDDEN)
    eagle3 |= {
        "midlayer.hidden_norm.weight": torch.ones(HIDDEN),
        "fc.weight": 0.3 * torch.randn(HIDDEN, 3 * HIDDEN, generator=generator) * HIDDEN**-0.5,
        "norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": weights["lm_head.weight"][KNOWN].clone(),
        "d2t": torch.tensor(KNOWN) - torch.arange(len(KNOWN)),
        "t2d": torch.zeros(VOCAB, dtype=torch.bool),
    }
    # Attention finds the token itself, and hands on a half of its embedding.
    found = torch.eye(32, 2 * HIDDEN)
    eagle3 |= {
        "midlayer.self_attn.q_proj.weight": 1.2 * torch.cat((found, found)),
        "midlayer.self_attn.k_proj.weight": 1.2 * found,
        "midlayer.self_attn.v_proj.weight": found,
        "midlayer.self_attn.o_proj.weight": torch.eye(HIDDEN, 64) * (torch.arange(64) < 32),
    }
    fields = {
        **of_head,
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": len(KNOWN),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [index - 1 for index in CAPTURED]},
    }
    write(directory / "eagle3", fields, eagle3)
    predictor = "model.mtp_layers.0"
    mimo = {**weights, **layer_of(predictor, generator)}
    for index in range(NUM_LAYERS):
        for part, rows in (("q", 64), ("k", 32), ("v", 32)):
            mimo[f"model.layers.{index}.self_attn.{part}_proj.bias"] = torch.zeros(rows)
    mimo |= {
        f"{predictor}.self_attn.{part}_proj.bias": 0.1 * torch.ones(rows)
        for part, rows in (("q", 64), ("k", 32), ("v", 32))
    }
    mimo |= {
        f"{predictor}.input_proj.weight": torch.cat((half + 0.05 * one, one), 1),
        **{
            f"{predictor}.{name}.weight": torch.ones(HIDDEN)
            for name in ("token_layernorm", "hidden_layernorm", "final_layernorm")
        },
    }
    fields = {**config, "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    write(directory / "mimo", fields, mimo)
    torch.save(KNOWN, directory / "hot.pt")
    (directory / "hot.json").write_text(json.dumps(KNOWN))
    return directory


def options_of(models: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """(the model, options that let such a head guess)"""
    common = {"disable_speculative_adaptation": True, "speculative_num_steps": NUM_STEPS}
    if kind == "mimo":
        return models / "mimo", {"speculative_algorithm": "NEXTN", **common}
    return models / "model", {
        "speculative_algorithm": kind.upper(),
        "speculative_draft_model_path": str(models / kind),
        **common,
    }


@pytest.fixture
def make(models: Path) -> Iterator[Callable[..., LLM]]:
    opened: dict[Path, Any] = {}

    def make_of(path: Path, **options: Any) -> LLM:
        if path not in opened:
            context = llms(path)
            opened[path] = (context, context.__enter__())
        return opened[path][1](**options)

    yield make_of
    for context, _ in opened.values():
        context.__exit__(None, None, None)


class Reference:
    """What a head of these files guesses, computed by transformers and in plain arithmetic."""

    def __init__(self, models: Path, kind: str, *, is_hot: bool = False) -> None:
        import transformers

        self._is_hot = is_hot

        path, _ = options_of(models, kind)
        name = "Qwen2ForCausalLM" if kind == "mimo" else "LlamaForCausalLM"
        loader = getattr(transformers, name)
        config = loader.config_class.from_pretrained(path)
        config.architectures = [name]
        self._model = loader.from_pretrained(path, config=config, dtype=torch.float32).eval()
        self._kind = kind
        self._weights = load_file((path if kind == "mimo" else models / kind) / "model.safetensors")
        self._head = getattr(reference, kind)(self._weights, SIZES)

    @torch.inference_mode()
    def guess(self, tokens: Sequence[int], count: int) -> list[list[int]]:
        """The ways that the text may go on, by a chain of guesses."""
        *known, states = self._taken(tokens)
        found = reference.guesses(*known, tokens, states, count)
        return [found[: end + 1] for end in range(count)]

    @torch.inference_mode()
    def guess_tree(
        self, tokens: Sequence[int], count: int, topk: int, most: int
    ) -> list[tuple[int, ...]]:
        """The same by a tree."""
        *known, states = self._taken(tokens)

        def after(way: Sequence[int]) -> Tensor:
            return reference.logits_after(*known, tokens, states, way)

        return reference.guessed_tree(after, count, topk, most)

    @torch.inference_mode()
    def _taken(self, tokens: Sequence[int]) -> tuple[reference.Head, Embed, Embed, Tensor]:
        """(the head, the embedding, the output layer, the states of all tokens but the last)"""
        said = self._model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
        states = said[-1][0]
        if self._kind == "eagle3":
            captured = torch.cat([said[layer][0] for layer in CAPTURED], -1)
            states = captured @ self._weights["fc.weight"].T
        return self._head, self._model.get_input_embeddings(), self._logits, states

    def _logits(self, hidden: Tensor) -> Tensor:
        if self._kind != "eagle3":
            every = self._model.lm_head(hidden)
            unknown = sorted({*range(VOCAB)} - {*KNOWN})
            return every.index_fill(1, torch.tensor(unknown), -torch.inf) if self._is_hot else every
        every = torch.full((len(hidden), VOCAB), -torch.inf)
        every[:, KNOWN] = hidden @ self._weights["lm_head.weight"].T
        return every


@pytest.mark.parametrize(
    ("kind", "token_map"),
    [("eagle", ""), ("eagle", "hot.pt"), ("eagle3", ""), ("mimo", ""), ("mimo", "hot.json")],
)
def test_a_head_guesses_what_its_mathematics_says(
    make: Callable[..., LLM], models: Path, kind: str, token_map: str
) -> None:
    path, options = options_of(models, kind)
    if token_map:
        options["speculative_token_map"] = str(models / token_map)
    llm, oracle = make(path, **options), Reference(models, kind, is_hot=bool(token_map))
    accepted = 0
    for prompt, sample in zip(PROMPTS, ask(llm, ignore_eos=True, max_new_tokens=24), strict=True):
        steps, right = reference.num_steps(prompt, sample.token_ids, oracle.guess, NUM_STEPS)
        assert sample.speculated is not None
        assert (sample.speculated.num_steps, sample.speculated.num_accepted) == (steps, right)
        accepted += right
    assert accepted > 4


def test_a_head_guesses_trees_as_its_mathematics_says(
    make: Callable[..., LLM], models: Path
) -> None:
    """And more of their guesses are right than of chains."""
    path, options = options_of(models, "eagle3")
    topk, most, asked = 3, 7, {"ignore_eos": True, "max_new_tokens": 24}
    trees = {"speculative_eagle_topk": topk, "speculative_num_draft_tokens": most + 1}
    oracle = Reference(models, "eagle3")
    samples = ask(make(path, **options, **trees), **asked)
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        steps = reference.num_steps(
            prompt,
            sample.token_ids,
            lambda tokens, count: oracle.guess_tree(tokens, count, topk, most),
            NUM_STEPS,
        )
        assert sample.speculated is not None
        assert (sample.speculated.num_steps, sample.speculated.num_accepted) == steps
    chains = ask(make(path, **options), **asked)
    assert [one.token_ids for one in samples] == [one.token_ids for one in chains]
    right_of_trees, right_of_chains = (
        sum(one.speculated.num_accepted for one in some if one.speculated)
        for some in (samples, chains)
    )
    assert right_of_trees > right_of_chains


@pytest.mark.parametrize(("kind", "seeds"), [("eagle", False), ("mimo", True)])
@pytest.mark.parametrize("topk", [1, 4])
def test_a_head_that_is_perfect_is_always_right(
    make: Callable[..., LLM], models: Path, tmp_path: Path, kind: str, seeds: bool, topk: int
) -> None:
    """Where no layer of the model adds anything, a head that hands the embedding on knows the next
    token. EAGLE's has no norm at the end, so its logits are right but for a factor."""
    path, options = options_of(models, kind)
    options["speculative_eagle_topk"] = topk
    flat = {
        name: torch.zeros_like(one) if name.endswith(("o_proj.weight", "down_proj.weight")) else one
        for name, one in load_file(path / "model.safetensors").items()
    }
    config = json.loads((path / "config.json").read_text())
    one, none = torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)
    if kind == "mimo":
        flat["model.mtp_layers.0.input_proj.weight"] = torch.cat((none, one), 1)
    else:
        head = load_file(models / kind / "model.safetensors")
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            head[f"layers.0.{name}.weight"] = torch.zeros_like(head[f"layers.0.{name}.weight"])
        head["fc.weight"] = torch.cat((one, none), 1)
        head_config = json.loads((models / kind / "config.json").read_text())
        draft = write(tmp_path / "head", head_config, head)
        options["speculative_draft_model_path"] = str(draft)
    llm = make(write(tmp_path / "flat", config, flat), **options)
    count = 2 * (NUM_STEPS + 1) + 1
    asked = [{}, {"temperature": 1.0, "seed": 5}] if seeds else [{}]
    for sampling in asked:
        samples = ask(llm, ignore_eos=True, max_new_tokens=count, **sampling)
        for prompt, sample in zip(PROMPTS, samples, strict=True):
            if len(prompt) == 1 and kind == "mimo":
                continue  # this head does not look at the token after a request's first
            assert sample.speculated is not None
            assert sample.speculated.num_steps == 3
            assert sample.speculated.num_accepted == 2 * NUM_STEPS
            if topk == 1:
                assert sample.speculated.num_accepted == sample.speculated.num_drafted


def test_heads_that_do_not_fit_are_named(
    make: Callable[..., LLM], models: Path, tmp_path: Path
) -> None:
    path, options = options_of(models, "eagle")
    with pytest.raises(ConfigError, match=r"use EAGLE$"):
        make(path, **{**options, "speculative_algorithm": "EAGLE3"})
    with pytest.raises(ConfigError, match="use STANDALONE"):
        make(path, **{**options, "speculative_draft_model_path": str(models / "mimo")})
    with pytest.raises(ConfigError, match="has no layer that predicts"):
        make(path, speculative_algorithm="NEXTN")
    with pytest.raises(ConfigError, match="name one with --speculative-draft-model-path"):
        make(path, speculative_algorithm="EAGLE3")
    hot = {"speculative_token_map": str(models / "hot.pt")}
    _, of_eagle3 = options_of(models, "eagle3")
    with pytest.raises(ConfigError, match="not for --speculative-algorithm EAGLE3"):
        make(path, **of_eagle3, **hot)
    config = json.loads((models / "eagle" / "config.json").read_text())
    head = load_file(models / "eagle" / "model.safetensors")
    wide = write(tmp_path / "wide", {**config, "hidden_size": 128}, head)
    with pytest.raises(ConfigError, match="the model's states have 64"):
        make(path, **{**options, "speculative_draft_model_path": str(wide)})
