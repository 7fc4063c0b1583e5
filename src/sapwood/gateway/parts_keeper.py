"""Who holds what workers bring (`model_parts.py`), as long as one of them is there."""

from __future__ import annotations

from typing import Protocol

from sapwood.base.errors import InvalidRequest
from sapwood.gateway.worker import Worker


class PartsKeeper(Protocol):
    """Holds what workers bring, as long as one of them is there."""

    def add(self, worker: Worker) -> None:
        """A new worker. InvalidRequest if what it brings cannot be, or contradicts another one."""
        ...

    async def prepare(self, worker: Worker) -> None:
        """Returns when what the worker brings can be used; its models are known by now.

        Raises SapwoodError if it cannot be used
        """
        ...

    def remove(self, worker: Worker) -> None:
        """The worker is gone."""
        ...


class NoParts:
    """A gateway without the packages that parts need."""

    def add(self, worker: Worker) -> None:
        if worker.spec.parts is not None:
            raise InvalidRequest(
                "tokenizer_path needs the packages tokenizers and jinja2 at the gateway; install "
                "them with `pip install tokenizers jinja2`",
                param="tokenizer_path",
            )

    async def prepare(self, worker: Worker) -> None:
        """No worker here brings anything."""

    def remove(self, worker: Worker) -> None:
        """No worker here brought anything."""
