"""Builds what compiles grammars and makes their masks on this rank, and how the scheduler hears of
it. The first grammar makes a rank read the tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from sapwood.base.channel import QueueChannel, Receiver
from sapwood.base.clock import Clock
from sapwood.executor.grammar.backends import ASKED, make_one
from sapwood.executor.grammar.compiler import GrammarCompiler, Way
from sapwood.executor.grammar.masks import GrammarMasks
from sapwood.executor.grammar.sandbox import GrammarSandbox, Setting
from sapwood.executor.grammar.vocabulary import Vocabulary, vocabulary_of
from sapwood.kernels.interface import Kernels
from sapwood.schema.config.engine import ResolvedConfig
from sapwood.schema.rank import GrammarAnswer, RankMessage
from sapwood.text.tokenizer import Tokenizer

PATIENCE = 10
"""A grammar waits for its turn as long as that many compilations may take. A thousand schemas may
come at once, each of which takes milliseconds."""


class LocalRank:
    """The one rank of an engine, in the scheduler's own process. See `GrammarRanks`."""

    num_ranks = 1

    def __init__(
        self, take: Callable[[RankMessage], None], answers: Receiver[GrammarAnswer]
    ) -> None:
        self._answers = answers
        self.send = take

    def answers(self) -> list[GrammarAnswer]:
        return self._answers.receive(0.0)


@dataclass(frozen=True, slots=True)
class GrammarParts:
    """The parts of an engine that enforce grammars.

    ranks     tells the scheduler how compilations went
    compiler  of this rank
    masks     makes the masks of this rank
    """

    ranks: LocalRank
    compiler: GrammarCompiler
    masks: Callable[[Kernels, dict[int, str]], GrammarMasks]


def build_grammars(
    config: ResolvedConfig,
    model_path: Path,
    *,
    vocab_size: int,
    eos_token_ids: Iterable[int],
    clock: Clock,
) -> GrammarParts | None:
    """Build the parts; None if requests with a grammar are refused."""
    options = config.grammar
    if options.grammar_backend == "none":
        return None
    ends = frozenset(eos_token_ids)
    num_rows = config.scheduler.max_running_requests
    tokenizer_path = Path(config.model.tokenizer_path or model_path)

    @functools.cache
    def vocabulary() -> Vocabulary:
        tokenizer = Tokenizer.from_directory(tokenizer_path)
        return vocabulary_of(tokenizer, size=vocab_size, ends=ends)

    # If steps overlap, the next step has been planned before the tokens of this one are known.
    may_jump = config.scheduler.overlap_depth == 1 and not options.disable_jump_forward

    def way(backend: str) -> Way:
        setting = Setting(
            tokenizer_path=str(tokenizer_path),
            vocab_size=vocab_size,
            ends=sorted(ends),
            config=options,
            backend=backend,
            timeout_s=options.grammar_compile_timeout,
        )
        return Way(lambda: make_one(backend, options, vocabulary()), GrammarSandbox(setting))

    answers: QueueChannel[GrammarAnswer] = QueueChannel()
    compiler = GrammarCompiler(
        [way(name) for name in ASKED[options.grammar_backend]],
        answers.send,
        patience_s=PATIENCE * options.grammar_compile_timeout,
        max_bytes=options.grammar_max_bytes,
        clock=clock,
    )

    def make_masks(kernels: Kernels, failures: dict[int, str]) -> GrammarMasks:
        return GrammarMasks(
            compiler,
            kernels,
            num_rows=num_rows,
            vocab_size=vocab_size,
            failures=failures,
            vocabulary=vocabulary,
            may_jump=may_jump,
        )

    return GrammarParts(LocalRank(compiler.take, answers), compiler, make_masks)
