"""What is recorded of the experts that compute tokens, for whoever wants to place experts well."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import InvalidRequest
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.schema.config.execution import PER_PASS, PER_TOKEN


class ExpertRecord:
    """The choices of the steps between `start` and `stop`, the last of them if there are many.

    Steps are added by one thread, all else is called by another one.
    """

    def __init__(
        self,
        mode: str,
        *,
        layers: Sequence[int],
        num_layers: int,
        num_experts: int,
        max_steps: int | None,
        folder: Path,
    ) -> None:
        """
        mode         how often each expert was chosen in a step (stat, stat_approx), the same with
                     the step's size (per_pass), or the experts of each token (per_token)
        layers       indices of the layers that have experts
        num_layers   of the model
        num_experts  of each of these layers
        max_steps    that are kept; None: all
        folder       of the files; made if need be
        """
        self._mode = mode
        self._layers = list(layers)
        self._shape = (num_layers, num_experts)
        self._folder = folder
        self._steps: deque[dict[str, Any]] = deque(maxlen=max_steps)
        self._lock = threading.Lock()
        self._num_steps = 0
        self.is_on = False

    def start(self) -> str:
        """Record from the next step on, and forget what was recorded before."""
        with self._lock:
            self._steps.clear()
            self._num_steps = 0
        self.is_on = True
        return "recording which experts are chosen"

    def stop(self) -> str:
        """Record no more; what was recorded can still be dumped."""
        self.is_on = False
        return "no longer recording which experts are chosen"

    def add(self, batch: ForwardBatch, chosen: Sequence[Tensor]) -> None:
        """chosen: [T, k] of each layer that has experts"""
        step: dict[str, Any] = {"num_tokens": len(batch.token_ids)}
        if self._mode == PER_TOKEN:
            step |= {
                "input_ids": batch.token_ids.clone(),
                "positions": batch.positions.clone(),
                "topk_ids_of_layer": self._of_all_layers(torch.stack(list(chosen))),
            }
        else:
            step["logical_count"] = self._of_all_layers(torch.stack([*map(self._counted, chosen)]))
        with self._lock:
            step["forward_pass_id"] = self._num_steps
            self._num_steps += 1
            self._steps.append(step)

    def dump(self, suffix: str = "") -> str:
        """Write what was recorded to a new file, which `torch.load` reads, and forget it.

        InvalidRequest if nothing was recorded; OSError if the file cannot be written."""
        with self._lock:
            steps = list(self._steps)
        if not steps:
            raise InvalidRequest(
                "no step has been recorded; start with /start_expert_distribution_record, and ask "
                "the model something"
            )
        path = self._folder / f"expert_distribution_recorder_{time.time()}{suffix}.pt"
        self._folder.mkdir(parents=True, exist_ok=True)
        torch.save(self._content(steps), path)
        with self._lock:
            for step in steps:
                if self._steps and self._steps[0] is step:
                    self._steps.popleft()
        return f"the choices of {len(steps)} steps were written to {path}"

    def _content(self, steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
        told = {"mode": self._mode, "num_experts": self._shape[1]}
        if self._mode in (PER_PASS, PER_TOKEN):
            return told | {"records": [_on_host(step) for step in steps]}
        return told | {
            "logical_count": torch.stack([step["logical_count"] for step in steps]).cpu()
        }

    def _counted(self, chosen: Tensor) -> Tensor:
        """[num_experts] int64; a token that an identity expert computes is not counted."""
        return torch.bincount(chosen.flatten(), minlength=self._shape[1])[: self._shape[1]]

    def _of_all_layers(self, values: Tensor) -> Tensor:
        """values [layers with experts, …] -> [layers, …], 0 in the others"""
        found = values.new_zeros(self._shape[0], *values.shape[1:])
        found[self._layers] = values
        return found


def _on_host(step: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.cpu() if isinstance(value, Tensor) else value for name, value in step.items()
    }
