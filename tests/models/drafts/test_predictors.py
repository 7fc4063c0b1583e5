"""Layers by which checkpoints predict further tokens, beside transformers' layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.build import Build
from sapwood.models.drafts.head import CombiningHead
from sapwood.models.lm.decoder import Decoder
from sapwood.models.loader.assign import load_weights
from sapwood.models.registry import decoder_class, read_decoder
from tests.models.drafts.reference import norm
from tests.models.lm.cases import peer_of
from tests.models.lm.harness import CPU, NewTokens, make_batch, make_kv_caches
from tests.models.lm.peer import Peer

NUM_TOKENS, PAGE = 30, 8
LONGCAT = "model.mtp.layers.0"


def layer_of(peer: Peer, index: int, x: Tensor, **more: Any) -> Tensor:
    found = peer.model.model.layers[index](x, **more)
    return found[0] if isinstance(found, tuple) else found


def attention_and_experts(peer: Peer, index: int, x: Tensor, **more: Any) -> Tensor:
    """Two layers of Nemotron H."""
    return layer_of(peer, index + 1, layer_of(peer, index, x, **more))


def dense_half(peer: Peer, index: int, x: Tensor, **more: Any) -> Tensor:
    """The first half of a layer of LongCat's, without the experts."""
    layer = peer.model.model.layers[index]
    x = x + layer.self_attn[0](layer.input_layernorm[0](x), **more)[0]
    return x + layer.mlps[0](layer.post_attention_layernorm[0](x))


@dataclass(frozen=True)
class Predictor:
    """Where a checkpoint has the parts.

    layer       of transformers' model that is the predictor's kind; -1 for one that is after the
                served model's last one
    block       name of the predictor's block
    blocks      names of the parts of several such layers, or of parts of one -> names of the
                predictor's; empty: the one layer is the one block
    projection, embedding_norm, state_norm, norm  names
    """

    case: str
    layer: int
    block: str
    projection: str
    embedding_norm: str
    state_norm: str
    norm: str | None
    drops_first: bool = False
    adds_one: bool = False
    """Whether the file has the differences of norms' weights from 1."""
    blocks: Mapping[str, str] = field(default_factory=dict)
    outcome: Callable[..., Tensor] = lambda peer, index, x, **more: layer_of(peer, index, x, **more)
    """(transformers' model, index of the layer, x [1, T, hidden], what its layers take beside it)
    -> what the predictor's block makes of x."""

    def block_weights(self, peer: Peer, index: int) -> dict[str, Tensor]:
        """The block's tensors, which are some of the model's."""
        blocks = self.blocks or {f"model.layers.{index}.": f"{self.block}."}
        return {
            f"{new}{name.removeprefix(old)}": one
            for name, one in peer.weights.items()
            for old, new in blocks.items()
            if name.startswith(old)
        }

    @property
    def names(self) -> dict[str, str | None]:
        return {
            "projection": self.projection,
            "embedding_norm": self.embedding_norm,
            "state_norm": self.state_norm,
            "norm": self.norm,
        }


def next_layer(case: str, *, layer: int = -1) -> Predictor:
    name = "model.layers.1" if layer == -1 else "model.layers.2"
    return Predictor(
        case, layer, name, f"{name}.eh_proj", f"{name}.enorm", f"{name}.hnorm",
        f"{name}.shared_head.norm",
    )  # fmt: skip


PREDICTORS = {
    "Glm4Moe": next_layer("glm4_moe"),
    "DeepSeek V3": next_layer("deepseek_v3"),
    "DeepSeek V3.2": next_layer("deepseek_v32"),
    "Glm4MoeLite": next_layer("glm4_moe_lite", layer=0),
    "Ernie 4.5": Predictor(
        "ernie4_5_moe", 0, "model.mtp_block.0", "model.mtp_linear_proj.0", "model.mtp_emb_norm.0",
        "model.mtp_hidden_norm.0", None, drops_first=True,
    ),
    "Qwen3.5": Predictor(
        "qwen3_5_moe", 1, "mtp.layers.0", "mtp.fc", "mtp.pre_fc_norm_embedding",
        "mtp.pre_fc_norm_hidden", "mtp.norm", adds_one=True,
    ),
    "K-EXAONE": Predictor(
        "exaone_moe", 0, "mtp.layers.0", "mtp.fc", "mtp.pre_fc_norm_embedding",
        "mtp.pre_fc_norm_hidden", "mtp.norm",
    ),
    "Nemotron H": Predictor(
        "nemotron_h, experts", 2, "mtp.layers", "mtp.layers.0.eh_proj", "mtp.layers.0.enorm",
        "mtp.layers.0.hnorm", "mtp.layers.1.final_layernorm",
        blocks={f"model.layers.{at + 2}.": f"mtp.layers.{at}." for at in range(2)},
        outcome=attention_and_experts,
    ),
    "LongCat": Predictor(
        "longcat_flash", 0, LONGCAT, f"{LONGCAT}.eh_proj", f"{LONGCAT}.enorm.m",
        f"{LONGCAT}.hnorm.m", "model.mtp.norm",
        blocks={
            f"model.layers.0.{old}.0.": f"{LONGCAT}.{new}."
            for old, new in {
                "self_attn": "self_attn", "mlps": "transformer_layer.mlp",
                "input_layernorm": "input_layernorm",
                "post_attention_layernorm": "post_attention_layernorm",
            }.items()
        },
        outcome=dense_half,
    ),
}  # fmt: skip


def served_beside(predictor: Predictor, **fields: Any) -> tuple[Peer, dict[str, Any]]:
    """(transformers' model, config.json of the model that is served)"""
    peer = peer_of(predictor.case, **fields)
    served = {**peer.hf_config, "num_nextn_predict_layers": 1}
    if predictor.layer == -1:
        count = served["num_hidden_layers"] = served["num_hidden_layers"] - 1
        for listed in {"mlp_layer_types", "indexer_types"} & served.keys():
            served[listed] = (served[listed] or [])[:count] or None
    return peer, served


def weight_of(extras: Mapping[str, Tensor], name: str, predictor: Predictor) -> Tensor:
    return extras[f"{name}.weight"] + predictor.adds_one


def extras_of(predictor: Predictor, size: int, hf: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that only a predictor has."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    found = {
        f"{name}.weight": (not predictor.adds_one) + 0.2 * random(size)
        for part, name in predictor.names.items()
        if name is not None and part != "projection"
    }
    found[f"{predictor.projection}.weight"] = random(size, 2 * size) * size**-0.5
    if hf.get("use_bias"):
        found[f"{predictor.projection}.bias"] = random(size)
    return found


def head_of(
    served: dict[str, Any], embedding: Tensor, weights: dict[str, Tensor]
) -> tuple[CombiningHead, Any]:
    build = Build(kernels=TorchKernels(), device=CPU, dtype=torch.float32)
    config = read_decoder(served)
    model = Decoder.of(config, build)
    kind = decoder_class(config.architecture)
    longer = kind.with_predictor(config)
    assert longer is not None
    head = CombiningHead(kind(longer, build).predictor(), model.embedding, model.lm_head)
    model.embedding.weight.copy_(embedding)
    load_weights(head, weights.items())
    head.finalize()
    return head, longer


@pytest.mark.parametrize("name", PREDICTORS)
@torch.inference_mode()
def test_a_predictor_is_that_of_its_mathematics(name: str) -> None:
    predictor = PREDICTORS[name]
    peer, served = served_beside(predictor)
    index = predictor.layer % len(peer.model.model.layers)
    size = served["hidden_size"]
    extras = extras_of(predictor, size, served)
    block = predictor.block_weights(peer, index)
    head, config = head_of(served, peer.model.get_input_embeddings().weight, {**block, **extras})
    eps = config.norm_eps
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(0, 131, (NUM_TOKENS,), generator=generator)
    states = torch.randn(NUM_TOKENS, size, generator=generator)

    embeds = peer.model.get_input_embeddings()(tokens)
    if predictor.drops_first:
        embeds[0] = 0.0
    halves = (
        norm(embeds, weight_of(extras, predictor.embedding_norm, predictor), eps),
        norm(states, weight_of(extras, predictor.state_norm, predictor), eps),
    )
    x = torch.cat(halves, -1) @ extras[f"{predictor.projection}.weight"].T
    x = x + extras.get(f"{predictor.projection}.bias", torch.zeros(size))
    places = torch.arange(NUM_TOKENS)
    seen = places[None] <= places[:, None]
    window = config.window_of(config.num_layers - 1)
    if window is not None:
        seen &= places[:, None] - places[None] < window
    mask = torch.zeros(NUM_TOKENS, NUM_TOKENS).masked_fill(~seen, -torch.inf)
    more = {"attention_mask": mask[None, None], "position_ids": places[None]}
    if hasattr(peer.model.model, "rotary_emb"):
        more["position_embeddings"] = peer.model.model.rotary_emb(x[None], places[None])
    expected = predictor.outcome(peer, index, x[None], **more)[0]
    if predictor.norm is not None:
        expected = norm(expected, weight_of(extras, predictor.norm, predictor), eps)

    caches = make_kv_caches(config, num_pages=8, page_size=PAGE)
    found = []
    for begin, end in ((0, 13), (13, 14), (14, NUM_TOKENS)):  # as chunks of a prompt
        request = NewTokens(tokens[begin:end].tolist(), begin, [6, 2, 5, 1])
        batch = make_batch([request], caches, page_size=PAGE)
        hidden, outcome = head.forward(batch, states[begin:end])
        assert hidden is outcome
        found.append(hidden)
    torch.testing.assert_close(torch.cat(found), expected, atol=2e-4, rtol=1e-4)
