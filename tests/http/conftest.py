"""The scripted engine of the dialects' tests: HTTP is tried with the dialects that stand on it."""

from __future__ import annotations

from tests.frontends.conftest import api, engine, guarded, services, tokenizer

__all__ = ["api", "engine", "guarded", "services", "tokenizer"]
