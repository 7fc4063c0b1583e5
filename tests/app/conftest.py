from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sapwood import LLM
from sapwood.executor.grammar.sandbox import GrammarSandbox, Setting
from tests.app.llms import llms_of
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
    """Engines with equal tokenizers and options of grammars share the process that tries grammars:
    each takes seconds to start, and a quarter of a gigabyte."""
    made: dict[tuple[bytes, bytes], KeptSandbox] = {}

    def shared(setting: Setting) -> KeptSandbox:
        tokenizer = (Path(setting.tokenizer_path) / "tokenizer.json").read_bytes()
        options = msgspec.json.encode(msgspec.structs.replace(setting, tokenizer_path=""))
        return made.setdefault((tokenizer, options), KeptSandbox(setting))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sapwood.app.building.grammars.GrammarSandbox", shared)
        yield
    for sandbox in made.values():
        GrammarSandbox.close(sandbox)


USUAL: dict[str, Any] = {
    "load_format": "dummy",
    "max_total_tokens": 2048,
    "skip_server_warmup": False,
}


@pytest.fixture
def make_llm(tiny_llama: Path) -> Iterator[Callable[..., LLM]]:
    """Opens LLMs of the tiny model, and closes them after the test."""
    with llms_of(tiny_llama, **USUAL) as make:
        yield make


@pytest.fixture(scope="module")
def make_shared_llm(tiny_llama: Path) -> Iterator[Callable[..., LLM]]:
    """The same for LLMs that the tests of a module share; the first grammar of each takes seconds,
    since it starts a process."""
    with llms_of(tiny_llama, **USUAL) as make:
        yield make
