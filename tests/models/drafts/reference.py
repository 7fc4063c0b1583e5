"""Draft heads in plain fp32 arithmetic, all places at once, and the steps that they save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
Head = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From embeddings and states, both [places, hidden], to what logits are made of and to states."""


@dataclass(frozen=True)
class Sizes:
    """Of one layer of Llama's kind."""

    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 32
    eps: float = 1e-5
    theta: float = 10000.0


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def attention(x: Tensor, weights: Weights, name: str, sizes: Sizes) -> Tensor:
    num_places, half = len(x), sizes.head_dim // 2

    def heads(part: str, count: int) -> Tensor:
        projected = F.linear(
            x, weights[f"{name}.{part}.weight"], weights.get(f"{name}.{part}.bias")
        )
        return projected.view(num_places, count, sizes.head_dim).transpose(0, 1)

    angles = torch.outer(
        torch.arange(num_places).float(), sizes.theta ** (-torch.arange(half).float() / half)
    )
    cos, sin = angles.cos(), angles.sin()

    def rotated(one: Tensor) -> Tensor:
        first, second = one[..., :half], one[..., half:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    q = rotated(heads("q_proj", sizes.num_heads))
    k = rotated(heads("k_proj", sizes.num_kv_heads))
    v = heads("v_proj", sizes.num_kv_heads)
    share = sizes.num_heads // sizes.num_kv_heads
    k, v = (one.repeat_interleave(share, dim=0) for one in (k, v))
    scores = q @ k.transpose(1, 2) * sizes.head_dim**-0.5
    scores = scores + torch.full((num_places, num_places), -torch.inf).triu(1)
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(num_places, -1)
    return F.linear(mixed, weights[f"{name}.o_proj.weight"])


def feed_forward(x: Tensor, weights: Weights, name: str) -> Tensor:
    gate, up = (F.linear(x, weights[f"{name}.{part}_proj.weight"]) for part in ("gate", "up"))
    return F.linear(F.silu(gate) * up, weights[f"{name}.down_proj.weight"])


def block(x: Tensor, weights: Weights, name: str, sizes: Sizes, *, normed: bool = True) -> Tensor:
    """A layer of Llama's; without `normed`, attention takes x as it is."""
    inner = norm(x, weights[f"{name}.input_layernorm.weight"], sizes.eps) if normed else x
    x = x + attention(inner, weights, f"{name}.self_attn", sizes)
    inner = norm(x, weights[f"{name}.post_attention_layernorm.weight"], sizes.eps)
    return x + feed_forward(inner, weights, f"{name}.mlp")


def eagle(weights: Weights, sizes: Sizes) -> Head:
    def head(embeds: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        x = F.linear(torch.cat((embeds, states), -1), weights["fc.weight"], weights.get("fc.bias"))
        x = block(x, weights, "layers.0", sizes, normed=False)
        return x, x

    return head


def eagle3(weights: Weights, sizes: Sizes) -> Head:
    """The states are those after `fc`."""

    def head(embeds: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat(
            (
                norm(embeds, weights["midlayer.input_layernorm.weight"], sizes.eps),
                norm(states, weights["midlayer.hidden_norm.weight"], sizes.eps),
            ),
            -1,
        )
        x = states + attention(both, weights, "midlayer.self_attn", sizes)
        inner = norm(x, weights["midlayer.post_attention_layernorm.weight"], sizes.eps)
        x = x + feed_forward(inner, weights, "midlayer.mlp")
        return norm(x, weights["norm.weight"], sizes.eps), x

    return head


def mimo(weights: Weights, sizes: Sizes) -> Head:
    name = "model.mtp_layers.0"

    def head(embeds: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        embeds = torch.cat((torch.zeros_like(embeds[:1]), embeds[1:]))
        halves = (
            norm(states, weights[f"{name}.hidden_layernorm.weight"], sizes.eps),
            norm(embeds, weights[f"{name}.token_layernorm.weight"], sizes.eps),
        )
        x = block(
            F.linear(torch.cat(halves, -1), weights[f"{name}.input_proj.weight"]),
            weights,
            name,
            sizes,
        )
        x = norm(x, weights[f"{name}.final_layernorm.weight"], sizes.eps)
        return x, x

    return head


def guesses(
    head: Head,
    embed: Callable[[Tensor], Tensor],
    logits: Callable[[Tensor], Tensor],
    tokens: Sequence[int],
    states: Tensor,
    count: int,
) -> list[int]:
    """What a head guesses to follow `tokens`.

    states  [len(tokens) - 1, hidden] of the model at all tokens but the last
    """
    found: list[int] = []
    for _ in range(count):
        found.append(int(logits_after(head, embed, logits, tokens, states, found).argmax()))
    return found


def logits_after(
    head: Head,
    embed: Callable[[Tensor], Tensor],
    logits: Callable[[Tensor], Tensor],
    tokens: Sequence[int],
    states: Tensor,
    way: Sequence[int],
) -> Tensor:
    """What a head thinks [vocab] of what follows `tokens` and the guesses `way`."""
    following = list(tokens[1:])
    for token_id in way:
        _, outcome = head(embed(torch.tensor(following)), states)
        following.append(token_id)
        states = torch.cat((states, outcome[-1:]))
    hidden, _ = head(embed(torch.tensor(following)), states)
    return logits(hidden[-1:])[0]


def guessed_tree(
    after: Callable[[Sequence[int]], Tensor], steps: int, topk: int, most: int
) -> list[tuple[int, ...]]:
    """The guesses of a tree, each as the way to it: the chain of the likeliest ones, and of the
    others those with the highest product of probabilities.

    after  what the head thinks of what follows a way"""
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    first, frontier = (), [()]

    def likeliest(ways: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return sorted(ways, key=lambda way: (way != first[: len(way)], -chances[way]))

    for _ in range(steps):
        newest = []
        for way in frontier:
            found = after(way).softmax(-1).topk(topk)
            for token_id, chance in zip(found.indices.tolist(), found.values.tolist(), strict=True):
                newest.append((*way, token_id))
                chances[newest[-1]] = chances[way] * chance
        first = newest[0]
        frontier = likeliest(newest)[:topk]
    return likeliest([way for way in chances if way])[:most]


def num_steps(
    prompt: Sequence[int],
    output: Sequence[int],
    guess: Callable[[list[int], int], Sequence[Sequence[int]]],
    most: int,
) -> tuple[int, int]:
    """(steps, right guesses) of a request whose steps verify up to `most` guesses in a row.

    guess  from all tokens so far and a number of guesses in a row to ways that the text may go on
    """
    done, steps, right = 1, 1, 0  # the prompt's step brings one token
    while done < len(output):
        count = min(most, len(output) - done - 1)
        guessed = guess([*prompt, *output[:done]], count) if count else []
        matching = max(
            (len(way) for way in guessed if [*way] == [*output[done : done + len(way)]]), default=0
        )
        done += matching + 1
        right += matching
        steps += 1
    return steps, right
