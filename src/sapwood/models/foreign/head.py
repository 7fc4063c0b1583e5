"""The part of a transformers model after its last norm, computed apart from its layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class _Given(nn.Module):
    """Stands for the layers of a model, whose result is known already."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=self.hidden)


class OutputLayer:
    """From hidden states to logits, with whatever the model does to these: scales, soft caps."""

    def __init__(self, model: Any) -> None:
        """model: a transformers model with an output layer, whose weights are used as they are"""
        self._given = _Given()
        # The same model, but for its layers.
        kind: Any = type(model)
        self._model = kind.__new__(kind)
        self._model.__dict__ = dict(model.__dict__)
        self._model._modules = {**model._modules, model.base_model_prefix: self._given}

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab], of any floating-point type"""
        self._given.hidden = hidden[None]
        try:
            logits: Tensor = self._model(inputs_embeds=hidden[None], use_cache=False).logits
            return logits[0]
        finally:
            self._given.hidden = None
