from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch

from sapwood import LLM
from sapwood.executor.grammar.sandbox import GrammarSandbox, Setting
from tests.tiny import write_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


class KeptSandbox(GrammarSandbox):
    """Goes on when an engine ends, for the next one."""

    def close(self) -> None:
        """The session's end closes it."""


@pytest.fixture(scope="session", autouse=True)
def shared_sandboxes() -> Iterator[None]:
    """Engines with the same tokenizer and options of grammars share the process that tries
    grammars: each takes seconds to start."""
    made: dict[bytes, KeptSandbox] = {}

    def shared(setting: Setting) -> KeptSandbox:
        return made.setdefault(msgspec.json.encode(setting), KeptSandbox(setting))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sapwood.app.grammars.GrammarSandbox", shared)
        yield
    for sandbox in made.values():
        GrammarSandbox.close(sandbox)


@pytest.fixture
def make_llm(tiny_llama: Path) -> Iterator[Callable[..., LLM]]:
    """Opens LLMs of the tiny model, and closes them after the test."""
    with llms_of(tiny_llama) as make:
        yield make


@pytest.fixture(scope="module")
def make_shared_llm(tiny_llama: Path) -> Iterator[Callable[..., LLM]]:
    """The same for LLMs that the tests of a module share; the first grammar of each takes seconds,
    since it starts a process."""
    with llms_of(tiny_llama) as make:
        yield make


@contextmanager
def llms_of(model: Path) -> Iterator[Callable[..., LLM]]:
    opened: list[LLM] = []
    num_threads = torch.get_num_threads()

    def make(**options: object) -> LLM:
        settings = {
            "load_format": "dummy",
            "dtype": "float32",
            "num_threads": 1,
            "max_total_tokens": 2048,
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
