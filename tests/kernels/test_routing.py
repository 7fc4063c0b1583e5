"""The rules by which routers choose experts: every implementation against transformers' gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.routing import Routing, Scores

HIDDEN, EXPERTS, K = 16, 8, 3
LOCAL = {"num_local_experts": EXPERTS}
TEXTS = 40
REFERENCE = ReferenceKernels()


def topk(module: str, name: str, **fields: Any) -> Callable[[], torch.nn.Module]:
    """Makes the gate of a module of transformers' models with a random weight."""

    def make() -> torch.nn.Module:
        from importlib import import_module

        models = "transformers.models"
        configs = import_module(f"{models}.{module}.configuration_{module}")
        config = getattr(configs, name.partition("Top")[0] + "Config")(hidden_size=HIDDEN, **fields)
        gate = getattr(import_module(f"{models}.{module}.modeling_{module}"), name)(config)
        for parameter in gate.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        for buffer in gate.buffers():
            torch.nn.init.normal_(buffer, std=0.4)
        return gate.eval()

    return make


GROUPS = {"n_group": 4, "topk_group": 2}
CASES: dict[str, tuple[Callable[[], torch.nn.Module], Routing]] = {
    "mixtral": (
        topk("mixtral", "MixtralTopKRouter", num_local_experts=EXPERTS, num_experts_per_tok=K),
        Routing(num_chosen=K, renormalise=True),
    ),
    "qwen2_moe": (
        topk("qwen2_moe", "Qwen2MoeTopKRouter", num_experts=EXPERTS, num_experts_per_tok=K),
        Routing(num_chosen=K),
    ),
    "qwen3_moe, renormalised": (
        topk(
            "qwen3_moe", "Qwen3MoeTopKRouter", num_experts=EXPERTS, num_experts_per_tok=K,
            norm_topk_prob=True,
        ),
        Routing(num_chosen=K, renormalise=True),
    ),
    "granitemoe": (
        topk("granitemoe", "GraniteMoeTopKRouter", num_experts_per_tok=K, **LOCAL),
        Routing(num_chosen=K, renormalise=True),
    ),
    "gpt_oss": (
        topk("gpt_oss", "GptOssTopKRouter", num_local_experts=EXPERTS, num_experts_per_tok=K),
        Routing(num_chosen=K, renormalise=True),
    ),
    "deepseek_v2, groups": (
        topk(
            "deepseek_v2", "DeepseekV2TopkRouter",
            n_routed_experts=EXPERTS, num_experts_per_tok=K, topk_method="group_limited_greedy",
            num_attention_heads=4, num_key_value_heads=4,
            routed_scaling_factor=1.7, **GROUPS,
        ),
        Routing(num_chosen=K, scale=1.7, num_groups=4, num_groups_chosen=2),
    ),
    "glm4_moe, groups": (
        topk(
            "glm4_moe", "Glm4MoeTopkRouter", n_routed_experts=EXPERTS,
            num_experts_per_tok=K, routed_scaling_factor=2.5, **GROUPS,
        ),
        Routing(
            num_chosen=K, scores=Scores.SIGMOID, renormalise=True, least_sum=1e-20, scale=2.5,
            num_groups=4, num_groups_chosen=2, group_best=2,
        ),
    ),
    "glm4_moe, one group": (
        topk(
            "glm4_moe", "Glm4MoeTopkRouter", n_routed_experts=EXPERTS,
            num_experts_per_tok=K, norm_topk_prob=False,
        ),
        Routing(num_chosen=K, scores=Scores.SIGMOID, group_best=2),
    ),
    "minimax_m2": (
        topk("minimax_m2", "MiniMaxM2TopKRouter", num_local_experts=EXPERTS, num_experts_per_tok=K),
        Routing(num_chosen=K, scores=Scores.SIGMOID, renormalise=True),
    ),
    "ernie4_5_moe": (
        topk(
            "ernie4_5_moe", "Ernie4_5_MoeTopKRouter",
            moe_num_experts=EXPERTS, moe_k=K, moe_norm_min=0.5,
        ),
        Routing(num_chosen=K, renormalise=True, least_sum=0.5),
    ),
    "longcat_flash": (
        topk(
            "longcat_flash", "LongcatFlashTopkRouter",
            n_routed_experts=EXPERTS - 2, zero_expert_num=2, moe_topk=K, num_experts_per_tok=K,
            routed_scaling_factor=6.0,
        ),
        Routing(num_chosen=K, scale=6.0),
    ),
    "phimoe": (
        topk(
            "phimoe", "PhimoeTopKRouter", num_local_experts=EXPERTS, num_experts_per_tok=2,
            router_jitter_noise=0.2,
        ),
        Routing(num_chosen=2, scores=Scores.SPARSEMIXER, jitter=0.2),
    ),
    "all experts": (
        topk("mixtral", "MixtralTopKRouter", num_experts_per_tok=EXPERTS, **LOCAL),
        Routing(num_chosen=EXPERTS, renormalise=True),
    ),
}  # fmt: skip


def correction_of(gate: torch.nn.Module) -> Tensor | None:
    found = [
        tensor for name, tensor in gate.state_dict().items() if "e_score_correction_bias" in name
    ]
    return found[0].flatten().float().contiguous() if found else None


def dense(weights: Tensor, chosen: Tensor) -> Tensor:
    """[T, EXPERTS]: each expert's weight, whatever the order of the choice."""
    assert all(len(set(row)) == len(row) for row in chosen.tolist())
    return torch.zeros(len(chosen), EXPERTS).scatter_(1, chosen, weights.detach().float())


@pytest.mark.parametrize("case", CASES)
def test_as_transformers_routes(any_kernels: Kernels, case: str) -> None:
    torch.manual_seed(3)
    make, routing = CASES[case]
    gate = make()
    x = torch.randn(TEXTS, HIDDEN)
    correction = correction_of(gate)
    inputs = (x,)
    if case == "minimax_m2":  # its correction lies outside the gate
        correction = torch.randn(EXPERTS) * 0.4
        inputs = (x, correction)
    logits, want_weights, want_ids = gate(*inputs)
    weights, ids = any_kernels.route(logits.detach().float(), correction, routing)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(dense(weights, ids), dense(want_weights, want_ids))
    if correction is not None:
        _, without = any_kernels.route(logits.detach().float(), None, routing)
        assert not torch.equal(ids, without), "the correction overturns no order here"


def test_as_llama4_routes(any_kernels: Kernels) -> None:
    """Its weight is the logistic function of the one chosen logit; it multiplies the inputs."""
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    torch.manual_seed(3)
    config = Llama4TextConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=1)
    gate = Llama4Router(config)
    scores, logits = gate(torch.randn(TEXTS, HIDDEN))
    routing = Routing(num_chosen=1, scores=Scores.SIGMOID)
    found = any_kernels.route(logits.detach(), None, routing)
    torch.testing.assert_close(dense(*found), scores.detach())


RULES = {
    "softmax": Routing(num_chosen=3, renormalise=True),
    "sigmoid": Routing(num_chosen=3, scores=Scores.SIGMOID),
    "groups": Routing(num_chosen=3, num_groups=4, num_groups_chosen=2, group_best=2),
    "sparsemixer": Routing(num_chosen=2, scores=Scores.SPARSEMIXER, jitter=0.1),
}


@pytest.mark.parametrize("rule", RULES)
def test_of_equal_experts_the_first_are_chosen(any_kernels: Kernels, rule: str) -> None:
    _, ids = any_kernels.route(torch.ones(2, 8), torch.zeros(8), RULES[rule])
    assert ids.tolist() == [list(range(RULES[rule].num_chosen))] * 2


@pytest.mark.parametrize("rule", RULES)
def test_every_implementation_chooses_as_the_reference(any_kernels: Kernels, rule: str) -> None:
    torch.manual_seed(5)
    logits = torch.randint(-3, 3, (50, 8)).float()  # many equal ones
    bias = torch.randint(-1, 2, (8,)) * 0.25
    found, want = (kernels.route(logits, bias, RULES[rule]) for kernels in (any_kernels, REFERENCE))
    assert torch.equal(found[1], want[1])
    torch.testing.assert_close(found[0], want[0])


def test_no_tokens(any_kernels: Kernels) -> None:
    weights, ids = any_kernels.route(torch.zeros(0, 8), None, RULES["softmax"])
    assert weights.shape == ids.shape == (0, 3)


@pytest.mark.parametrize(
    ("fields", "num_experts", "message"),
    [
        ({"num_chosen": 0}, 8, "a token needs an expert"),
        ({"num_chosen": 9}, 8, "k is 9, but there are 8 experts"),
        ({"num_chosen": 3, "num_groups": 4, "num_groups_chosen": 1}, 8, "there are 2 experts"),
        ({"num_chosen": 1, "num_groups": 3}, 8, "do not make 3 groups"),
        ({"num_chosen": 1, "num_groups": 2, "num_groups_chosen": 3}, 8, "cannot be chosen"),
        ({"num_chosen": 1, "num_groups": 4, "group_best": 3}, 8, "of which the best 3 count"),
        ({"num_chosen": 3, "scores": Scores.SPARSEMIXER}, 8, "two experts"),
    ],
)
def test_rules_that_do_not_fit(
    any_kernels: Kernels, fields: dict[str, Any], num_experts: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        any_kernels.route(torch.ones(3, num_experts), None, Routing(**fields))
