"""What models with experts have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sapwood.kernels.activations import Activation
from sapwood.kernels.routing import Routing
from sapwood.layers.experts import Experts, Fused, Latent, PerExpert, Shared
from sapwood.layers.layer import FeedForward
from sapwood.layers.router import Router
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.lm.architecture import Architecture


class MixtureArchitecture(Architecture):
    """A decoder whose feed-forwards are mixtures, but for the dense layers that the config says.

    A subclass says how its config spells the experts (`experts_in`), and which rule chooses them
    (`routing`); the usual rule is a softmax over all experts."""

    router_name: ClassVar[str] = "gate"
    router_bias: ClassVar[bool] = False
    correction_name: ClassVar[str | None] = None
    """Of the correction bias in the checkpoint; None: there is none."""
    correction_is_row: ClassVar[bool] = False
    """Whether that is [1, experts]."""
    limit: ClassVar[float | None] = None
    """As in layers/experts.Experts."""
    weighs_inputs: ClassVar[bool] = False
    """As in layers/experts.Experts."""
    experts_class: ClassVar[type[Experts]] = Experts
    """Of the layers that mixtures are made of."""
    shared_name: ClassVar[str] = "shared_experts"
    """Of the experts that every token has, if there are any."""
    shared_gate: ClassVar[str | None] = None
    """Of the linear layer that weighs them; None: their weight is 1."""

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        return replace(config, experts=cls.experts_in(config))

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        """The facts about experts in config.hf; ConfigError for what does not fit."""
        raise NotImplementedError

    def routing(self, experts: ExpertsConfig) -> Routing:
        return Routing(
            num_chosen=experts.num_per_token,
            renormalise=bool(self.config.hf.get("norm_topk_prob")),
        )

    def files(self) -> PerExpert | Fused:
        """How the checkpoint has the experts."""
        return PerExpert()

    def activation(self) -> Activation:
        return Activation(self.config.activation)

    def feed_forward(self, index: int) -> FeedForward:
        experts = self.config.experts
        assert experts is not None, "read() says them"
        return self.dense() if index in experts.dense_layers else self.mixture(experts)

    def dense(self) -> FeedForward:
        return self.gated_mlp()

    def shared_expert(self, size: int) -> FeedForward:
        return self.gated_mlp(size=size, build=self.build.beside_experts)

    def latent(self) -> Latent | None:
        """As in layers/experts.Experts."""
        return None

    def mixture(self, experts: ExpertsConfig) -> Experts:
        hidden_size = self.config.hidden_size
        router = Router(
            self.build,
            hidden_size,
            experts.num_experts + experts.num_identity,
            self.routing(experts),
            name=self.router_name,
            bias=self.router_bias,
            correction=self.correction_name,
            correction_is_row=self.correction_is_row,
        )
        shared = None
        if experts.shared_size:
            body = self.shared_expert(experts.shared_size)
            shared = Shared(name=self.shared_name, body=body, gate=self.shared_gate)
        return self.experts_class(
            self.build,
            hidden_size,
            experts.intermediate_size,
            num_experts=experts.num_experts,
            router=router,
            activation=self.activation(),
            files=self.files(),
            limit=self.limit,
            weighs_inputs=self.weighs_inputs,
            shared=shared,
            num_identity=experts.num_identity,
            gated=self.has_gates,
            latent=self.latent(),
        )


def dense_layers(hf: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Layers without experts as Qwen says them: a list, and all but every n-th."""
    listed = hf.get("mlp_only_layers") or []
    step = int(hf.get("decoder_sparse_step") or 1)
    return tuple(layer for layer in range(num_layers) if layer in listed or (layer + 1) % step != 0)


def listed_dense_layers(
    hf: Mapping[str, Any], *, otherwise: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """Layers without experts as newer files say them: by the kind of each layer's feed-forward."""
    kinds = hf.get("mlp_layer_types")
    if kinds is None:
        return otherwise
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "dense")
