"""The rules by which routers choose experts: every implementation against transformers' gates."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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


def given_by_dbrx(block: Any, x: Tensor) -> tuple[Tensor, ...]:
    logits = block.router(x)
    return (logits, *block.route_tokens_to_experts(logits))


def given_by_llama4(gate: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Its weight is the logistic function of a chosen logit; it multiplies the inputs."""
    scores, logits = type(gate).forward(gate, x)
    return (logits, *scores.topk(gate.top_k))


GIVES = {"DbrxFFN": given_by_dbrx, "Llama4Router": given_by_llama4}
"""What gives (logits, weights, experts) where a gate does not."""


def topk(module: str, name: str, **fields: Any) -> Callable[[], torch.nn.Module]:
    """Makes the gate of a module of transformers' models with a random weight."""

    def make() -> torch.nn.Module:
        from importlib import import_module

        models = "transformers.models"
        configs = import_module(f"{models}.{module}.configuration_{module}")
        family = re.split("Top|Gate|Token|Router|FFN", name)[0]
        kind = "TextConfig" if module == "llama4" else "Config"
        config = getattr(configs, family + kind)(hidden_size=HIDDEN, **fields)
        gate = getattr(import_module(f"{models}.{module}.modeling_{module}"), name)(config)
        if (gives := GIVES.get(name)) is not None:
            gate.forward = partial(gives, gate)
        for parameter in gate.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        for buffer in gate.buffers():
            torch.nn.init.normal_(buffer, std=0.4)
        return gate.eval()

    return make


GROUPS = {"n_group": 4, "topk_group": 2}
GROUPED = Routing(
    num_chosen=K, scores=Scores.SIGMOID, renormalise=True, least_sum=1e-20, scale=2.5,
    num_groups=4, num_groups_chosen=2, group_best=2,
)  # fmt: skip
PER_TOKEN = {"num_experts": EXPERTS, "num_experts_per_tok": K}
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
        GROUPED,
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
    "exaone_moe, groups": (
        topk("exaone_moe", "ExaoneMoeTopkRouter", routed_scaling_factor=2.5, **PER_TOKEN, **GROUPS),
        GROUPED,
    ),
    "solar_open, groups": (
        topk(
            "solar_open", "SolarOpenTopkRouter", n_routed_experts=EXPERTS,
            num_experts_per_tok=K, routed_scaling_factor=2.5, **GROUPS,
        ),
        GROUPED,
    ),
    "mimo_v2_flash, groups": (
        topk(
            "mimo_v2_flash", "MiMoV2FlashTopkRouter", n_routed_experts=EXPERTS,
            num_experts_per_tok=K, routed_scaling_factor=2.5, **GROUPS,
        ),
        GROUPED,
    ),
    "dots1, one group": (
        topk("dots1", "Dots1TopkRouter", n_routed_experts=EXPERTS, num_experts_per_tok=K),
        Routing(num_chosen=K, scores=Scores.SIGMOID, group_best=2),
    ),
    "afmoe": (
        topk("afmoe", "AfmoeTokenChoiceRouter", route_scale=1.5, **PER_TOKEN),
        Routing(
            num_chosen=K, scores=Scores.SIGMOID, renormalise=True, least_sum=1e-20, scale=1.5
        ),
    ),
    "lfm2_moe": (
        topk("lfm2_moe", "Lfm2MoeTopKRouter", **PER_TOKEN),
        Routing(num_chosen=K, scores=Scores.SIGMOID, renormalise=True, least_sum=1e-6),
    ),
    "hunyuan_v1_moe": (
        topk("hunyuan_v1_moe", "HunYuanMoEV1Gate", num_experts=EXPERTS, moe_topk=K),
        Routing(num_chosen=K, renormalise=True),
    ),
    "dbrx": (
        topk("dbrx", "DbrxFFN", ffn_config={"moe_num_experts": EXPERTS, "moe_top_k": K},
             d_model=HIDDEN),
        Routing(num_chosen=K, renormalise=True),
    ),
    "llama4": (
        topk("llama4", "Llama4Router", num_experts_per_tok=1, **LOCAL),
        Routing(num_chosen=1, scores=Scores.SIGMOID),
    ),
    "llama4, several": (
        topk("llama4", "Llama4Router", num_experts_per_tok=K, **LOCAL),
        Routing(num_chosen=K, scores=Scores.SIGMOID),
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


OUTSIDE = ("afmoe", "lfm2_moe", "minimax_m2")
"""Cases whose correction lies outside the gate."""


class Gate:
    """A gate of transformers and its rule. Experts 2 n and 2 n + 1 have equal logits if asked."""

    def __init__(self, case: str, *, in_pairs: bool = False) -> None:
        torch.manual_seed(3)
        make, self.routing = CASES[case]
        self.module: Any = make()
        self.correction = torch.randn(EXPERTS) * 0.4 if case in OUTSIDE else None
        if in_pairs:
            for tensor in (*self.module.parameters(), *self.module.buffers(), self.correction):
                if tensor is not None:
                    rows = tensor.data.T if len(tensor) == 1 else tensor.data
                    rows[1::2] = rows[::2]
        self._is_given = self.correction is not None
        if self.correction is None:
            self.correction = correction_of(self.module)
        self._takes_texts = case == "afmoe"

    def choose_all(self) -> None:
        self.module.top_k = EXPERTS
        self.routing = replace(
            self.routing, num_chosen=EXPERTS, num_groups_chosen=self.routing.num_groups
        )
        if hasattr(self.module, "topk_group"):
            self.module.topk_group = self.module.num_group

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, weights, experts)"""
        x = x[None] if self._takes_texts else x
        found = self.module(x, self.correction) if self._is_given else self.module(x)
        logits, weights, chosen = (tensor.detach() for tensor in found)
        return logits.float(), weights, chosen


@pytest.mark.parametrize("case", CASES)
def test_as_transformers_routes(any_kernels: Kernels, case: str) -> None:
    gate = Gate(case)
    logits, want_weights, want_ids = gate(torch.randn(TEXTS, HIDDEN))
    weights, ids = any_kernels.route(logits, gate.correction, gate.routing)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(dense(weights, ids), dense(want_weights, want_ids))
    if gate.correction is not None:
        _, without = any_kernels.route(logits, None, gate.routing)
        assert not torch.equal(ids, without), "the correction overturns no order here"


@pytest.mark.parametrize("case", [case for case in CASES if case != "phimoe"])
def test_as_transformers_weighs_all_experts(any_kernels: Kernels, case: str) -> None:
    gate = Gate(case)
    gate.choose_all()
    logits, want_weights, want_ids = gate(torch.randn(TEXTS, HIDDEN))
    weights, ids = any_kernels.route(logits, gate.correction, gate.routing)
    assert ids.shape == (TEXTS, EXPERTS)
    torch.testing.assert_close(dense(weights, ids), dense(want_weights, want_ids))


@pytest.mark.parametrize("case", CASES)
def test_equal_experts_weigh_as_in_transformers(any_kernels: Kernels, case: str) -> None:
    """Which of them transformers chooses is left open; here the first are chosen."""
    gate = Gate(case, in_pairs=True)
    logits, want_weights, _ = gate(torch.randn(TEXTS, HIDDEN))
    assert torch.equal(logits[:, ::2], logits[:, 1::2])
    weights, ids = any_kernels.route(logits, gate.correction, gate.routing)
    torch.testing.assert_close(weights.sort().values, want_weights.float().sort().values)
    for row in map(set, ids.tolist()):
        assert all(expert % 2 == 0 or expert - 1 in row for expert in row)


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
