"""What the routes for pictures are given."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from sapwood.base.errors import NotFound
from sapwood.frontends.images.stored import PictureStore
from sapwood.observe.tracing import Tracing
from sapwood.schema.config.painting import PaintingConfig
from sapwood.schema.painting import (
    LorasAnswer,
    LoraWish,
    Paint,
    PainterReady,
    PainterStatus,
    PaintEvent,
)


class PaintingClient(Protocol):
    """The engine that draws, as routes see it (`sapwood.diffusion.client`)."""

    @property
    def info(self) -> PainterReady: ...

    @property
    def unavailable_reason(self) -> str | None: ...

    def paint(self, request: Paint) -> AsyncIterator[PaintEvent]: ...

    async def status(self) -> PainterStatus: ...

    async def change_loras(
        self,
        kind: Literal["set", "merge", "unmerge"],
        *,
        wishes: Sequence[LoraWish] = (),
        target: str = "all",
        strength: float | None = None,
    ) -> LorasAnswer: ...

    async def list_loras(self) -> LorasAnswer: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PaintingServices:
    """shows_paths: whether answers say where a picture lies on the server's disk"""

    engine: PaintingClient
    config: PaintingConfig
    store: PictureStore
    model_name: str
    model_path: str
    created: int
    version: str
    serves_metrics: bool = False
    shows_paths: bool = False
    tracing: Tracing | None = None

    def check_model(self, asked: str | None) -> None:
        """NotFound if a request is for another model than the one that is served."""
        if asked is not None and asked not in (self.model_name, self.model_path, "default"):
            raise NotFound(
                f"there is no model {asked[:200]!r} here; this server has {self.model_name!r}",
                param="model",
            )
