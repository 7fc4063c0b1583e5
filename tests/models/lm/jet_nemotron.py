"""A small Jet-Nemotron and its formulas, computed token by token: transformers does not have it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.lm.peer import SIZES, Peer

WINDOW, HEAD_DIM, THETA = 21, 32, 1e6
HEADS, KEY_DIM, VALUE_DIM, LENGTH, GENERATOR = 4, 12, 20, 4, 16
JET = {
    "conv_size": LENGTH,
    "dconv_generator_reduction": HEADS * VALUE_DIM // GENERATOR,
    "expand_v": 1.6666666667,
    "head_dim": KEY_DIM,
    "norm_eps": "1e-5",
    "num_heads": HEADS,
}
HF: dict[str, Any] = {
    **SIZES,
    "architectures": ["JetNemotronForCausalLM"],
    "model_type": "jet_nemotron",
    "num_hidden_layers": 4,
    "layer_types": ["jet", "swa", "jet", "attn"],
    "efficient_attention_config": {"jet": JET, "swa": {"window_size": WINDOW}},
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": THETA,
    "rope_scaling": None,
    "tie_word_embeddings": True,
}


class Formulas(Peer):
    """The model in fp32, one token after the other, straight from its formulas."""

    def logits(self, token_ids: list[int]) -> Tensor:
        """As Peer.logits."""
        x = self.weights["model.embed_tokens.weight"][token_ids]
        for index, kind in enumerate(self.hf_config["layer_types"]):
            name = f"model.layers.{index}"
            normed = self.normed(x, f"{name}.input_layernorm")
            mixer = f"{name}.self_attn"
            if kind == "jet":
                x = x + self.jet(normed, mixer)
            else:
                x = x + self.attention(normed, mixer, WINDOW if kind == "swa" else len(x))
            normed = self.normed(x, f"{name}.post_attention_layernorm")
            gate = F.silu(self.linear(normed, f"{name}.mlp.gate_proj"))
            up = self.linear(normed, f"{name}.mlp.up_proj")
            x = x + self.linear(gate * up, f"{name}.mlp.down_proj")
        return self.normed(x, "model.norm") @ self.weights["model.embed_tokens.weight"].t()

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def normed(self, x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.weights[f"{name}.weight"]

    def jet(self, x: Tensor, name: str) -> Tensor:
        q, k = (F.silu(self.linear(x, f"{name}.{part}_proj")) for part in "qk")
        v, gate, write, decay = (self.linear(x, f"{name}.{part}_proj") for part in "vgba")
        convolution = f"{name}.dynamic_conv1d.kernel_generator"
        taps = self.linear(F.silu(self.linear(x, f"{convolution}.w1")), f"{convolution}.w2")
        rate, shift = self.weights[f"{name}.A_log"].exp(), self.weights[f"{name}.dt_bias"]
        state = torch.zeros(HEADS, KEY_DIM, VALUE_DIM)
        rows = []
        for token in range(len(x)):
            convolved = torch.zeros(HEADS * VALUE_DIM)
            for tap, factor in enumerate(taps[token].view(-1, LENGTH).unbind(1)):
                at = token - LENGTH + 1 + tap
                if at >= 0:
                    convolved += factor * v[at]
            value = F.silu(convolved).view(HEADS, VALUE_DIM)
            query, key = (
                part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt()
                for part in (q[token].view(HEADS, KEY_DIM), k[token].view(HEADS, KEY_DIM))
            )
            kept = torch.exp(-rate * F.softplus(decay[token] + shift))
            state = state * kept[:, None, None]
            there = torch.einsum("hk,hkv->hv", key, state)
            new = write[token].sigmoid()[:, None] * (value - there)
            state = state + torch.einsum("hk,hv->hkv", key, new)
            read = torch.einsum("hk,hkv->hv", query * KEY_DIM**-0.5, state)
            weighed = self.normed(read, f"{name}.o_norm", 1e-5)
            rows.append((weighed * F.silu(gate[token].view(HEADS, VALUE_DIM))).flatten())
        return self.linear(torch.stack(rows), f"{name}.o_proj")

    def attention(self, x: Tensor, name: str, window: int) -> Tensor:
        q, k, v = (
            self.linear(x, f"{name}.{part}_proj").view(len(x), -1, HEAD_DIM) for part in "qkv"
        )
        position = torch.arange(len(x))
        angle = position[:, None] * THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        cos, sin = (table[:, None, :] for table in (angle.cos(), angle.sin()))

        def rotated(part: Tensor) -> Tensor:
            a, b = part.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (rotated(k), v))
        scores = torch.einsum("qhd,khd->hqk", rotated(q), k) * HEAD_DIM**-0.5
        distance = position[:, None] - position
        scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        return self.linear(mixed.flatten(1), f"{name}.o_proj")


def shapes() -> dict[str, tuple[int, ...]]:
    """Of all tensors of a checkpoint."""
    hidden, inner = HF["hidden_size"], HF["intermediate_size"]
    queries = HF["num_attention_heads"] * HEAD_DIM
    keys = HF["num_key_value_heads"] * HEAD_DIM
    values = HEADS * VALUE_DIM
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (HF["vocab_size"], hidden)}
    found["model.norm.weight"] = (hidden,)
    for index, kind in enumerate(HF["layer_types"]):
        name = f"model.layers.{index}"
        mixer = f"{name}.self_attn"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{name}.{norm}.weight"] = (hidden,)
        for part in ("gate_proj", "up_proj"):
            found[f"{name}.mlp.{part}.weight"] = (inner, hidden)
        found[f"{name}.mlp.down_proj.weight"] = (hidden, inner)
        if kind == "jet":
            sizes = {"q": HEADS * KEY_DIM, "k": HEADS * KEY_DIM, "v": values, "g": values}
            sizes |= {"a": HEADS, "b": HEADS}
            convolution = f"{mixer}.dynamic_conv1d.kernel_generator"
            found[f"{convolution}.w1.weight"] = (GENERATOR, hidden)
            found[f"{convolution}.w2.weight"] = (values * LENGTH, GENERATOR)
            found[f"{convolution}.w2.bias"] = (values * LENGTH,)
            found[f"{mixer}.A_log"] = found[f"{mixer}.dt_bias"] = (HEADS,)
            found[f"{mixer}.o_norm.weight"] = (VALUE_DIM,)
            found[f"{mixer}.o_proj.weight"] = (hidden, values)
        else:
            sizes = {"q": queries, "k": keys, "v": keys}
            found |= {f"{mixer}.{part}_proj.bias": (size,) for part, size in sizes.items()}
            found[f"{mixer}.o_proj.weight"] = (hidden, queries)
        found |= {f"{mixer}.{part}_proj.weight": (size, hidden) for part, size in sizes.items()}
    return found


@cache
def peer() -> Formulas:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes().items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            weights[name] = 1 + 0.2 * noise
        else:
            weights[name] = noise * (0.3 if len(shape) == 1 else shape[1] ** -0.5)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] *= 0.5  # what layers add, so that rounding errors grow less
    return Formulas(HF, weights, None)
