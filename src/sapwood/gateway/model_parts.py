"""What a worker brings for the chats of its model: its tokenizer, its template, its parsers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sapwood.base.errors import InvalidRequest

if TYPE_CHECKING:
    from sapwood.gateway.worker import Worker

MAX_PATH_CHARACTERS = 4096
MAX_TEMPLATE_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParts:
    """By what the gateway makes texts of a model's tokens.

    tokenizer_path  directory on the gateway's machine
    chat_template   file, built-in name or text of a template that replaces the tokenizer's own
    tool_parser, reasoning_parser   formats; None for both: the workers make the chats
    """

    tokenizer_path: str
    chat_template: str | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None

    @property
    def makes_chats(self) -> bool:
        return self.tool_parser is not None or self.reasoning_parser is not None

    def check(self) -> None:
        """InvalidRequest if these parts cannot be meant so."""
        if not 1 <= len(self.tokenizer_path) <= MAX_PATH_CHARACTERS:
            raise InvalidRequest(
                f"tokenizer_path has {len(self.tokenizer_path)} characters but must have 1 to "
                f"{MAX_PATH_CHARACTERS}",
                param="tokenizer_path",
            )
        if self.chat_template is None:
            return
        if len(self.chat_template) > MAX_TEMPLATE_CHARACTERS:
            raise InvalidRequest(
                f"chat_template has {len(self.chat_template)} characters but may have at most "
                f"{MAX_TEMPLATE_CHARACTERS}",
                param="chat_template",
            )
        if not self.makes_chats:
            raise InvalidRequest(
                "chat_template does nothing unless the gateway makes the chats; give tool_parser "
                "or reasoning_parser too",
                param="chat_template",
            )


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
