"""llama.cpp through the C interface that llama-cpp-python wraps: all requests in one context.

The peer's `model` names a GGUF file. The option is `n_ubatch`: the tokens that llama.cpp computes
at once (default: 512, as in its own programs)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import lt
from typing import Any

from sapwood.base.errors import ConfigError, EngineUnavailable
from sapwood.bench.offline import Generated, TokenGenerator
from sapwood.bench.peers.interface import PeerSetup

MAX_BATCH = 2048
"""Tokens of one call at most, as in llama.cpp's own programs."""


@contextmanager
def open_llama_cpp(setup: PeerSetup) -> Iterator[TokenGenerator]:
    """Load the model. ConfigError for unknown options, EngineUnavailable if it cannot be loaded."""
    import llama_cpp

    options = dict(setup.options)
    n_ubatch = options.pop("n_ubatch", 512)
    if options or not isinstance(n_ubatch, int):
        raise ConfigError("a llama_cpp peer takes the option n_ubatch, a number")
    llama_cpp.llama_backend_init()
    loading = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(setup.model_dir.encode(), loading)
    if not model:
        raise EngineUnavailable(f"llama.cpp cannot load {setup.model_dir}")
    generator = LlamaCppGenerator(llama_cpp, model, setup.num_threads, n_ubatch)
    try:
        yield generator
    finally:
        generator.close()
        llama_cpp.llama_model_free(model)


class LlamaCppGenerator:
    """Computes all prompts, then one token of each request per call, greedily."""

    def __init__(self, llama_cpp: Any, model: Any, num_threads: int, n_ubatch: int) -> None:
        self._lib = llama_cpp
        self._model = model
        self._num_threads = num_threads
        self._n_ubatch = n_ubatch
        self._num_tokens = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(MAX_BATCH, 0, 1)
        self._context: Any = None
        self._sizes = (0, 0)

    def generate(
        self, prompts: Sequence[Sequence[int]], output_lengths: Sequence[int]
    ) -> list[Generated]:
        """The outputs of all prompts, at once; EngineUnavailable if llama.cpp fails."""
        needs = [
            len(prompt) + length for prompt, length in zip(prompts, output_lengths, strict=True)
        ]
        self._open(len(prompts), sum(needs))
        newest = self._prefill(prompts)
        lengths = list(map(len, prompts))
        for step in range(1, max(output_lengths)):
            running = [one for one, length in enumerate(output_lengths) if step < length]
            tokens = [(newest[one], lengths[one] + step - 1, one, True) for one in running]
            newest |= self._decode(tokens)
        return [Generated(num_output_tokens=length) for length in output_lengths]

    def close(self) -> None:
        if self._context is not None:
            self._lib.llama_free(self._context)
            self._context = None
        self._lib.llama_batch_free(self._batch)

    def _open(self, num_requests: int, num_tokens: int) -> None:
        """An empty context that is large enough; the last one if it is."""
        lib = self._lib
        if self._context is None or any(map(lt, self._sizes, (num_requests, num_tokens))):
            if self._context is not None:
                lib.llama_free(self._context)
            most_requests, most_tokens = self._sizes
            self._sizes = (max(most_requests, num_requests), max(most_tokens, num_tokens))
            params = lib.llama_context_default_params()
            params.n_seq_max, params.n_ctx = self._sizes
            params.n_batch, params.n_ubatch = MAX_BATCH, self._n_ubatch
            params.n_threads = params.n_threads_batch = self._num_threads
            params.kv_unified = True  # the requests' lengths may differ
            self._context = lib.llama_init_from_model(self._model, params)
            if not self._context:
                raise EngineUnavailable(f"llama.cpp has no context of {self._sizes[1]} tokens")
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> dict[int, int]:
        tokens = [
            (token, position, one, position == len(prompt) - 1)
            for one, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        newest: dict[int, int] = {}
        for begin in range(0, len(tokens), MAX_BATCH):
            newest |= self._decode(tokens[begin : begin + MAX_BATCH])
        return newest

    def _decode(self, tokens: Sequence[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Request -> the likeliest next token, for (token, position, request, is wanted)."""
        import numpy as np

        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, (token, position, request, is_wanted) in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = request
            batch.logits[index] = is_wanted
        status = self._lib.llama_decode(self._context, batch)
        if status != 0:
            raise EngineUnavailable(f"llama_decode gave {status} for {len(tokens)} tokens")
        chosen = {}
        for index, (_, _, request, is_wanted) in enumerate(tokens):
            if is_wanted:
                logits = self._lib.llama_get_logits_ith(self._context, index)
                chosen[request] = int(np.ctypeslib.as_array(logits, (self._num_tokens,)).argmax())
        return chosen
