"""LLMs of tiny models, which tests open with other options than usual."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sapwood import LLM

Make = Callable[..., LLM]
"""From options, and perhaps another `model`, to an LLM."""


@contextmanager
def llms_of(model: Path, **usual: Any) -> Iterator[Make]:
    """Opens LLMs of this model, and closes them all in the end.

    usual  options of each of them, unless the caller gives others"""
    opened: list[LLM] = []
    num_threads = torch.get_num_threads()

    def make(model: Path | str = model, **options: Any) -> LLM:
        settings = {
            "dtype": "float32",
            "num_threads": 1,
            "max_total_tokens": 1024,
            "skip_server_warmup": True,
            **usual,
            **options,
        }
        opened.append(LLM(str(model), **settings))
        return opened[-1]

    try:
        yield make
    finally:
        for llm in opened:
            llm.close()
        torch.set_num_threads(num_threads)
