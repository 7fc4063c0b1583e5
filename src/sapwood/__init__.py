"""sapwood serves language, vision and diffusion models.

from sapwood import LLM, Painter, SamplingParams
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sapwood.app.offline.engine import Engine
    from sapwood.app.offline.llm import LLM, EmbeddingResult, GenerationResult
    from sapwood.app.on_ray.serving import serve_ray
    from sapwood.app.painting.painter import PaintedPicture, Painter
    from sapwood.app.painting.sglang_names import DiffGenerator
    from sapwood.schema.sampling import SamplingParams

__all__ = [
    "LLM",
    "DiffGenerator",
    "EmbeddingResult",
    "Engine",
    "GenerationResult",
    "PaintedPicture",
    "Painter",
    "SamplingParams",
    "serve_ray",
]

_EXPORTS = {
    "LLM": "sapwood.app.offline.llm",
    "EmbeddingResult": "sapwood.app.offline.llm",
    "Engine": "sapwood.app.offline.engine",
    "GenerationResult": "sapwood.app.offline.llm",
    "DiffGenerator": "sapwood.app.painting.sglang_names",
    "PaintedPicture": "sapwood.app.painting.painter",
    "Painter": "sapwood.app.painting.painter",
    "SamplingParams": "sapwood.schema.sampling",
    "serve_ray": "sapwood.app.on_ray.serving",
}


def __getattr__(name: str) -> Any:
    """Load what is exported when it is first asked for: the command line must start fast."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)
