"""The loop around llama.cpp; llama.cpp itself is not installed here, a stand-in counts upwards."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest

from sapwood.base.errors import ConfigError, EngineUnavailable
from sapwood.bench.peers.interface import PeerSetup
from sapwood.bench.peers.llama_cpp_peer import MAX_BATCH, open_llama_cpp

VOCAB = 5000


class StandIn:
    """Its model's next token is one more than the last, in the same request."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[int, int, int, bool]]] = []
        self.contexts: list[SimpleNamespace] = []
        self.status = 0
        self._logits: dict[int, ctypes.Array[ctypes.c_float]] = {}

    def llama_backend_init(self) -> None: ...

    def llama_model_default_params(self) -> object:
        return object()

    def llama_model_load_from_file(self, path: bytes, params: object) -> str | None:
        return None if path == b"missing" else "model"

    def llama_model_free(self, model: object) -> None: ...

    def llama_model_get_vocab(self, model: object) -> object:
        return model

    def llama_vocab_n_tokens(self, vocab: object) -> int:
        return VOCAB

    def llama_batch_init(self, size: int, embd: int, requests: int) -> SimpleNamespace:
        def numbers() -> list[int]:
            return [0] * size

        return SimpleNamespace(
            n_tokens=0, token=numbers(), pos=numbers(), n_seq_id=numbers(), logits=numbers(),
            seq_id=[[0] for _ in range(size)],
        )  # fmt: skip

    def llama_batch_free(self, batch: object) -> None: ...

    def llama_context_default_params(self) -> SimpleNamespace:
        return SimpleNamespace()

    def llama_init_from_model(self, model: object, params: SimpleNamespace) -> SimpleNamespace:
        self.contexts.append(params)
        return params

    def llama_free(self, context: object) -> None: ...

    def llama_get_memory(self, context: object) -> object:
        return context

    def llama_memory_clear(self, memory: object, data: bool) -> None: ...

    def llama_decode(self, context: object, batch: SimpleNamespace) -> int:
        call = [
            (batch.token[i], batch.pos[i], batch.seq_id[i][0], bool(batch.logits[i]))
            for i in range(batch.n_tokens)
        ]
        self.calls.append(call)
        self._logits = {}
        for index, (token, _, _, is_wanted) in enumerate(call):
            if is_wanted:
                self._logits[index] = (ctypes.c_float * VOCAB)()
                self._logits[index][token + 1] = 1.0
        return self.status

    def llama_get_logits_ith(self, context: object, index: int) -> object:
        return ctypes.cast(self._logits[index], ctypes.POINTER(ctypes.c_float))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "llama_cpp", stand_in)
    return stand_in


def setup(**changes: object) -> PeerSetup:
    given = {"model_dir": "model.gguf", "dtype": "bfloat16", "num_threads": 2, **changes}
    return PeerSetup(**given)


def test_prompts_and_then_a_token_of_each_request_per_call(library: StandIn) -> None:
    with open_llama_cpp(setup()) as generator:
        done = generator.generate([[10, 11], [30]], [3, 2])
    assert [one.num_output_tokens for one in done] == [3, 2]
    assert library.calls == [
        [(10, 0, 0, False), (11, 1, 0, True), (30, 0, 1, True)],
        [(12, 2, 0, True), (31, 1, 1, True)],
        [(13, 3, 0, True)],
    ]
    [context] = library.contexts
    assert (context.n_seq_max, context.n_ctx, context.n_threads) == (2, 8, 2)


def test_long_prompts_are_cut_and_a_context_is_kept(library: StandIn) -> None:
    with open_llama_cpp(setup()) as generator:
        generator.generate([[7] * (MAX_BATCH + 1)], [1])
        generator.generate([[7] * 3], [1])
        generator.generate([[7], [8]], [1, 1])
    assert [len(call) for call in library.calls] == [MAX_BATCH, 1, 3, 2]
    assert [one.n_seq_max for one in library.contexts] == [1, 2]
    assert library.contexts[1].n_ctx == MAX_BATCH + 2


def test_failures_are_said(library: StandIn) -> None:
    with pytest.raises(EngineUnavailable, match="cannot load missing"):
        open_llama_cpp(setup(model_dir="missing")).__enter__()
    with pytest.raises(ConfigError, match="n_ubatch"):
        open_llama_cpp(setup(options={"threads": 2})).__enter__()
    with open_llama_cpp(setup()) as generator:
        library.status = 1
        with pytest.raises(EngineUnavailable, match="llama_decode gave 1 for 2 tokens"):
            generator.generate([[1, 2]], [1])
