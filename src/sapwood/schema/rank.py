"""What the scheduler and the ranks tell each other besides plans and results."""

from __future__ import annotations

from typing import Literal

import msgspec

from sapwood.schema.config.engine import EngineConfig, ResolvedConfig
from sapwood.schema.grammar import Grammar
from sapwood.schema.output import Finish, RankFacts
from sapwood.schema.request import LoadAdapter, UnloadAdapter
from sapwood.schema.step import StepPlan
from sapwood.schema.weights import WeightOrder


class CompileGrammar(msgspec.Struct, frozen=True, kw_only=True, tag="compile_grammar"):
    """Compile a grammar, or keep it if it is compiled, until it is released.

    id  names this order in its answer and its release; no two orders have the same
    """

    id: int
    grammar: Grammar


class ReleaseGrammar(msgspec.Struct, frozen=True, kw_only=True, tag="release_grammar"):
    """No open request needs the grammar of that order any more."""

    id: int


RankMessage = CompileGrammar | ReleaseGrammar


class GrammarAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A rank's answer to an order: plans may have rows with the grammar from now on, or not.

    refusal  how requests that need the grammar end; None: it is ready
    """

    id: int
    rank: int
    refusal: Finish | None = None


# ---- between the process of rank 0, which is the engine's, and those of the other ranks ----------


class RankHello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """The first message of a rank.

    token    what the engine's process handed to its own children; "" from other machines
    options  the options with which this rank's machine was started, by name
    """

    rank: int
    pid: int
    host: str
    token: str = ""
    options: dict[str, str | int | float | bool | None] = {}


class RankPool(msgspec.Struct, frozen=True, kw_only=True, tag="pool"):
    """How many tokens a rank's memory holds; back from rank 0: the smallest over all ranks."""

    max_total_tokens: int


class RankReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The rank has its part of the model."""

    facts: RankFacts


class RankFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The last message of a rank that cannot go on."""

    reason: str


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """How the loading of a LoRA adapter ended.

    num_bytes   that the adapter takes on the rank; 0 if it failed
    invocation  token ids that activate it; none: it is active everywhere
    content     a digest of what it contains
    failure     why it failed; None: it did not
    """

    call_id: str
    adapter_id: str
    num_bytes: int = 0
    invocation: tuple[int, ...] = ()
    content: str = ""
    failure: str | None = None


class WeightsTold(msgspec.Struct, frozen=True, kw_only=True, tag="weights_told"):
    """How an order about a rank's weights ended.

    failure  why it could not be carried out; None: it was
    """

    number: int
    message: str = ""
    failure: str | None = None


class PartsTold(msgspec.Struct, frozen=True, kw_only=True, tag="parts_told", omit_defaults=True):
    """How an order about a rank's parts of stored pages ended.

    count    pages that are there, or were read or written, from the first on
    failure  why it could not be carried out; None: it was
    """

    number: int
    count: int = 0
    failure: str | None = None


RankReport = RankHello | RankPool | RankReady | Loaded | WeightsTold | PartsTold | RankFailed


class RankStart(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """What the rank is to run.

    asked         with what the engine was started
    meeting_port  where the ranks' groups are made, on the host of rank 0
    """

    asked: EngineConfig
    config: ResolvedConfig
    meeting_port: int


class RunStep(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    plan: StepPlan


class WeightsTask(msgspec.Struct, frozen=True, kw_only=True, tag="weights"):
    """A part of an order about weights and memory, which all ranks carry out.

    number  names it in the answer
    part    check: refuse what cannot be, and change nothing; do: carry it out; undo: have the
            weights from before the last update again
    """

    number: int
    part: Literal["check", "do", "undo"]
    order: WeightOrder


class PartsTask(msgspec.Struct, frozen=True, kw_only=True, tag="parts", omit_defaults=True):
    """What a rank is to do with its parts of pages in the storage (see `PageParts`).

    number   names it in the answer
    backend  to be opened, with these settings
    names    of pages, without the rank; with those to be read or written their pools and slots
    """

    number: int
    action: Literal["open", "count", "read", "write", "clear", "close"]
    backend: str = ""
    extra: dict[str, str | int | float | bool | None] = {}
    names: list[str] = []
    pools: list[int] = []
    slots: list[int] = []


class EndRank(msgspec.Struct, frozen=True, kw_only=True, tag="end"):
    """No more steps will come."""


RankOrder = (
    RankStart | RankPool | RunStep | LoadAdapter | UnloadAdapter | WeightsTask | PartsTask | EndRank
)
