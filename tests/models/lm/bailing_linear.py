"""A small Ling 2.5 and a small Ring Linear, and their formulas, computed token by token:
transformers has neither."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.lm.peer import SIZES, Peer

HEADS, HEAD_DIM, ROTARY_DIM, THETA, EPS = 6, 32, 16, 6e5, 1e-6
EXPERTS, CHOSEN, EXPERT_SIZE, GROUPS, CHOSEN_GROUPS = 8, 3, 40, 4, 2
RANK, QUERY_RANK, ROPE_DIM, NOPE_DIM, VALUE_DIM = 32, 24, 32, 12, 20
LAYERS, LAYER_GROUP = 5, 2
NORM_GROUPS = 3

COMMON: dict[str, Any] = {
    **SIZES,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_qkv_bias": False,
    "use_bias": False,
    "use_qk_norm": True,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": EXPERT_SIZE,
    "moe_router_enable_expert_bias": True,
    "norm_topk_prob": True,
    "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "num_shared_experts": 1,
    "n_group": GROUPS,
    "topk_group": CHOSEN_GROUPS,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "layer_group_size": LAYER_GROUP,
    "group_norm_size": NORM_GROUPS,
    "linear_silu": False,
    "partial_rotary_factor": ROTARY_DIM / HEAD_DIM,
}
RING: dict[str, Any] = {
    **COMMON,
    "architectures": ["BailingMoeLinearV2ForCausalLM"],
    "model_type": "bailing_moe_linear",
    "num_key_value_heads": 2,
}
LING: dict[str, Any] = {
    **COMMON,
    "architectures": ["BailingMoeV2_5ForCausalLM"],
    "model_type": "bailing_hybrid",
    "num_key_value_heads": HEADS,
    "kv_lora_rank": RANK,
    "q_lora_rank": QUERY_RANK,
    "qk_rope_head_dim": ROPE_DIM,
    "qk_nope_head_dim": NOPE_DIM,
    "v_head_dim": VALUE_DIM,
    "rope_interleave": True,
}


def attends(layer: int) -> bool:
    """Whether a layer has softmax attention: each second one, and the last, without a partner."""
    return layer in (1, 3, 4)


def slopes(layer: int) -> Tensor:
    """Of 6 heads: those of 4, and then the first, third, … of those of 8."""
    four = [2.0 ** (-2 * i) for i in range(1, 5)]
    eight = [2.0**-i for i in range(1, 9)]
    return torch.tensor(four + eight[::2][:2]) * (1 - (layer - 1) / (LAYERS - 1) + 1e-5)


class Formulas(Peer):
    """The model in fp32, one token after the other, straight from its formulas."""

    def logits(self, token_ids: list[int]) -> Tensor:
        """As Peer.logits."""
        x = self.weights["model.word_embeddings.weight"][token_ids]
        for layer in range(LAYERS):
            name = f"model.layers.{layer}"
            normed = self.normed(x, f"{name}.input_layernorm")
            x = x + self.mixer(layer, normed, f"{name}.attention")
            normed = self.normed(x, f"{name}.post_attention_layernorm")
            x = x + (self.experts if layer else self.mlp)(normed, f"{name}.mlp")
        return self.linear(self.normed(x, "model.norm"), "lm_head")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def normed(self, x: Tensor, name: str) -> Tensor:
        return unit(x) * self.weights[f"{name}.weight"]

    def mlp(self, x: Tensor, name: str) -> Tensor:
        gate = F.silu(self.linear(x, f"{name}.gate_proj"))
        return self.linear(gate * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    def experts(self, x: Tensor, name: str) -> Tensor:
        rows = []
        for row in x:
            scores = self.linear(row, f"{name}.gate").sigmoid()
            wanted = scores + self.weights[f"{name}.gate.expert_bias"]
            groups = wanted.view(GROUPS, -1)
            best = groups.topk(2).values.sum(-1).topk(CHOSEN_GROUPS).indices
            allowed = torch.full_like(groups, -torch.inf)
            allowed[best] = groups[best]
            chosen = allowed.flatten().topk(CHOSEN).indices
            weights = 2.5 * scores[chosen] / (scores[chosen].sum() + 1e-20)
            total = self.mlp(row, f"{name}.shared_experts")
            for weight, expert in zip(weights, chosen.tolist(), strict=True):
                total = total + weight * self.mlp(row, f"{name}.experts.{expert}")
            rows.append(total)
        return torch.stack(rows)

    def mixer(self, layer: int, x: Tensor, name: str) -> Tensor:
        if not attends(layer):
            return self.lightning(layer, x, name)
        return self.latent(x, name) if "kv_lora_rank" in self.hf_config else self.grouped(x, name)

    def queries_keys_values(self, x: Tensor, name: str, kv_heads: int) -> list[Tensor]:
        """Normed and rotated: q, k, v [T, heads, HEAD_DIM]"""
        heads = self.linear(x, f"{name}.query_key_value").view(len(x), -1, HEAD_DIM)
        q, k, v = heads.split([HEADS, kv_heads, kv_heads], 1)
        q, k = self.normed(q, f"{name}.query_layernorm"), self.normed(k, f"{name}.key_layernorm")
        q, k = (
            torch.cat((rotated(part[..., :ROTARY_DIM]), part[..., ROTARY_DIM:]), -1)
            for part in (q, k)
        )
        return [q, k, v]

    def lightning(self, layer: int, x: Tensor, name: str) -> Tensor:
        q, k, v = self.queries_keys_values(x, name, HEADS)
        gate = self.linear(x, f"{name}.g_proj")
        kept = torch.exp(-slopes(layer))[:, None, None]
        state = torch.zeros(HEADS, HEAD_DIM, HEAD_DIM)
        rows = []
        for token in range(len(x)):
            state = state * kept + torch.einsum("hk,hv->hkv", k[token], v[token])
            read = torch.einsum("hk,hkv->hv", q[token] * HEAD_DIM**-0.5, state)
            normed = unit(read.view(NORM_GROUPS, -1)).flatten()
            rows.append(normed * self.weights[f"{name}.g_norm.weight"] * gate[token].sigmoid())
        return self.linear(torch.stack(rows), f"{name}.dense")

    def grouped(self, x: Tensor, name: str) -> Tensor:
        q, k, v = self.queries_keys_values(x, name, self.hf_config["num_key_value_heads"])
        k, v = (part.repeat_interleave(HEADS // part.shape[1], 1) for part in (k, v))
        return self.linear(attention(q, k, v), f"{name}.dense")

    def latent(self, x: Tensor, name: str) -> Tensor:
        inner = self.normed(self.linear(x, f"{name}.q_a_proj"), f"{name}.q_a_layernorm")
        q = self.linear(inner, f"{name}.q_b_proj").view(len(x), HEADS, NOPE_DIM + ROPE_DIM)
        made = self.linear(x, f"{name}.kv_a_proj_with_mqa")
        inner = self.normed(made[:, :RANK], f"{name}.kv_a_layernorm")
        kv = self.linear(inner, f"{name}.kv_b_proj").view(len(x), HEADS, NOPE_DIM + VALUE_DIM)
        shared = rotated(halved(made[:, None, RANK:])).expand(-1, HEADS, -1)
        k = torch.cat((kv[..., :NOPE_DIM], shared), -1)
        q = torch.cat((q[..., :NOPE_DIM], rotated(halved(q[..., NOPE_DIM:]))), -1)
        return self.linear(attention(q, k, kv[..., NOPE_DIM:]), f"{name}.dense")


def unit(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def halved(x: Tensor) -> Tensor:
    """Neighbouring pairs as two halves."""
    return torch.cat((x[..., ::2], x[..., 1::2]), -1)


def rotated(x: Tensor) -> Tensor:
    """x [T, heads, size], halves paired, by the tokens' positions"""
    size = x.shape[-1]
    angle = torch.arange(len(x))[:, None] * THETA ** (-torch.arange(0, size, 2) / size)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def shapes(hf: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of all tensors of a checkpoint."""
    hidden, inner, vocab = hf["hidden_size"], hf["intermediate_size"], hf["vocab_size"]
    width = HEADS * HEAD_DIM
    found: dict[str, tuple[int, ...]] = {
        "model.word_embeddings": (vocab, hidden),
        "model.norm": (hidden,),
        "lm_head": (vocab, hidden),
    }

    def mlp(name: str, size: int) -> None:
        found.update({f"{name}.{part}_proj": (size, hidden) for part in ("gate", "up")})
        found[f"{name}.down_proj"] = (hidden, size)

    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        mixer = f"{name}.attention"
        found[f"{name}.input_layernorm"] = found[f"{name}.post_attention_layernorm"] = (hidden,)
        if attends(layer) and "kv_lora_rank" in hf:
            found[f"{mixer}.q_a_proj"] = (QUERY_RANK, hidden)
            found[f"{mixer}.q_a_layernorm"] = (QUERY_RANK,)
            found[f"{mixer}.q_b_proj"] = (HEADS * (NOPE_DIM + ROPE_DIM), QUERY_RANK)
            found[f"{mixer}.kv_a_proj_with_mqa"] = (RANK + ROPE_DIM, hidden)
            found[f"{mixer}.kv_a_layernorm"] = (RANK,)
            found[f"{mixer}.kv_b_proj"] = (HEADS * (NOPE_DIM + VALUE_DIM), RANK)
            found[f"{mixer}.dense"] = (hidden, HEADS * VALUE_DIM)
        else:
            kv_heads = hf["num_key_value_heads"] if attends(layer) else HEADS
            found[f"{mixer}.query_key_value"] = (width + 2 * kv_heads * HEAD_DIM, hidden)
            found[f"{mixer}.query_layernorm"] = found[f"{mixer}.key_layernorm"] = (HEAD_DIM,)
            found[f"{mixer}.dense"] = (hidden, width)
        if not attends(layer):
            found[f"{mixer}.g_proj"] = (width, hidden)
            found[f"{mixer}.g_norm"] = (width,)
        if not layer:
            mlp(f"{name}.mlp", inner)
            continue
        found[f"{name}.mlp.gate"] = (EXPERTS, hidden)
        mlp(f"{name}.mlp.shared_experts", EXPERT_SIZE)
        for expert in range(EXPERTS):
            mlp(f"{name}.mlp.experts.{expert}", EXPERT_SIZE)
    tensors = {f"{name}.weight": shape for name, shape in found.items()}
    biases = {
        f"model.layers.{layer}.mlp.gate.expert_bias": (EXPERTS,) for layer in range(1, LAYERS)
    }
    return tensors | biases


@cache
def peer(name: str, **other_fields: Any) -> Formulas:
    """name: ling or ring"""
    hf = {"ling": LING, "ring": RING}[name] | other_fields
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for tensor, shape in shapes(hf).items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in tensor:
            weights[tensor] = 1 + 0.2 * noise
        elif tensor.endswith("expert_bias"):
            weights[tensor] = 0.1 * noise
        else:
            weights[tensor] = noise * shape[1] ** -0.5
        if tensor.endswith(("dense.weight", "down_proj.weight")):
            weights[tensor] *= 0.5  # what layers add, so that rounding errors grow less
    return Formulas(hf, weights, None)
