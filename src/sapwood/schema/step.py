"""The plan of one step, which the scheduler sends to every rank, and the result that comes back.

A rank keeps a row of state per running request: its page tables, its sampling parameters and the
token that it sampled last. A plan carries only what changed. Plans are executed in order, so a page
or row that a plan frees may be used by the next one at once, even while the first is in flight.

A step computes a span of each of its requests: tokens that are known, then perhaps drafts, which
are guesses. The rank samples after the last known token and after each draft, and keeps what it
sampled up to the first token that is not the next draft. So a span with d drafts brings from 1 to
d + 1 tokens, and these are the tokens that d + 1 steps of one token would have brought.

Drafts may be a tree (schema/draft_tree.py): then a draft sees only the drafts that it follows, and
the rank keeps what it sampled on the way from the known tokens through the drafts that were right.
Every draft has its own place in the request's pages; the rank moves the keys and values of those
that were right together, so that afterwards they lie as if they had been a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import Protocol

import msgspec

from sapwood.schema.draft_tree import depths, path_of
from sapwood.schema.logprobs import TokenLogprobs
from sapwood.schema.media import Medium
from sapwood.schema.request import RequestOptions


class TokenFeed(Enum):
    """Who hands a sampled token to the step that computes it.

    ROW        the rank that sampled the token: it finds the token in the request's row, so the next
               step can be planned before anybody else knows the token
    SCHEDULER  the scheduler, in a later plan's `token_ids`: a request is not scheduled again before
               its tokens are known. For stages of a pipeline, of which only the last samples, and
               for an engine that leaves the decoding to another.
    """

    ROW = auto()
    SCHEDULER = auto()


class RowStart(msgspec.Struct, frozen=True, kw_only=True):
    """A request takes this row from this step on.

    prompt_ids  the request's prompt; empty if there are input_embeds, which are as in `Generate`
    output_ids  the request's output tokens so far, if it was retracted; else empty
    options     what the request asks for; if it tells of tokens, every token is computed before it
                is put out
    seed        seed of the request's random numbers
    media       what the prompt shows, without pixels: its vectors take the place of the embeddings
                of its tokens
    num_prompt  tokens of the prompt, if it shows something
    first_position  what is added to the index of a token for ForwardBatch.positions
    adapter_slot  of the request's adapter while it has this row; -1: none
    adapter_start  the first token in the request that has the adapter
    """

    row: int
    options: RequestOptions
    seed: int
    prompt_ids: list[int]
    output_ids: list[int]
    input_embeds: list[bytes] = []
    media: list[Medium] = []
    num_prompt: int = 0
    first_position: int = 0
    adapter_slot: int = -1
    adapter_start: int = 0


class ScheduledTokens(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of the request in `row`: a span.

    position    index of the first new token in the request
    token_ids   ids of the new tokens; empty: the single token that this row sampled last
    draft_ids   guesses of the tokens that follow; only if a token is sampled after `token_ids`
    follows     whether the span begins after the tokens that the row's last step has brought, which
                only the rank knows. `position` and `num_output` are then those if that step brought
                one token, `token_ids` is empty, and `draft_ids` stand for as many of the rank's
                own guesses. The pages are there, however many tokens it brought
    draft_parents  of a tree of drafts, as in schema/draft_tree.py; empty: a chain
    num_guesses  how many tokens in a row after those that this step brings the rank shall guess,
                for the request's next step; only if a token is sampled, and only of a rank with a
                drafter. The pages for the keys and values of all that the drafter computes for
                them are there
    guesses_end  no token with this or a higher index in the request may be guessed
    first_page  index in the row's page table from which `pages` replaces its entries; this is the
                table of the pool that keeps every token (see schema/cache.py)
    windows     the same for the row's table of each window pool: (first page, pages). Entries
                before the tokens that a step looks at may be old ones.
    slot        holds the request's state before and after this step; before a request's first token
                whatever is there is of no meaning. -1: the model keeps no states
    copies      (source, target) slots of states. The copies of all entries of a plan happen at
                once, before its step: none sees what another has written.
    num_output  output tokens before the first token that this step samples; None: nothing is
                sampled
    num_scored  number of new tokens, from `first_scored` in the request on, after which the log
                probability of the next prompt token is wanted
    num_hidden  number of new tokens, counted from the end, whose hidden states are wanted
    num_routed  the same for the experts that compute them
    answers     whether these tokens end a prompt whose embedding or scores are wanted
    """

    row: int
    position: int
    token_ids: list[int]
    first_page: int
    pages: list[int]
    num_output: int | None
    draft_ids: list[int] = []
    follows: bool = False
    draft_parents: list[int] = []
    num_guesses: int = 0
    guesses_end: int = 0
    windows: list[tuple[int, list[int]]] = []
    slot: int = -1
    copies: list[tuple[int, int]] = []
    first_scored: int = 0
    num_scored: int = 0
    num_hidden: int = 0
    num_routed: int = 0
    answers: bool = False

    @property
    def num_new(self) -> int:
        """Tokens that the step computes, drafts included."""
        return (len(self.token_ids) or 1) + len(self.draft_ids)

    @property
    def logits_for(self) -> range:
        """Which of the new tokens want a token sampled after them."""
        count = 0 if self.num_output is None else 1 + len(self.draft_ids)
        return range(self.num_new - count, self.num_new)

    @property
    def sampled_depths(self) -> list[int]:
        """Of each of the new tokens in `logits_for`: how many drafts lie on the way to it."""
        if self.draft_parents:
            return [0, *depths(self.draft_parents)]
        return list(range(len(self.logits_for)))

    def right_drafts(self, token_ids: Sequence[int]) -> list[int]:
        """Which drafts were right, if the span brought these tokens."""
        return path_of(self.draft_ids, self.draft_parents, token_ids)

    @property
    def end(self) -> int:
        """Number of the request's tokens that are computed once this step is done, the drafts
        counted as if all of them were right."""
        return self.position + self.num_new


class CopiedPage(msgspec.Struct, frozen=True, array_like=True):
    """A page, or a state, that goes from one tier to another: the bytes of all layers.

    pool    index of its pool
    source  number of the page or slot that is read
    target  of the one that is written
    """

    pool: int
    source: int
    target: int


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One step. `scheduled` has the requests with one new token first; it may be empty.

    ends  rows of requests with a grammar that have left since the plan before; the rank drops the
          state of these grammars before any row starts anew
    adapters  (slot, id) of adapters that slots have from this step on; "": none any more
    adapter_copies  ids of adapters to be copied to the device beside steps, once the slots have
              changed; a slot has one of them only after it is known to be there
    forgets  digests of media whose vectors go, before this plan's are made
    encodes  media whose vectors are made before the step, and stay
    saves    pages and states that are copied to the host before anything else, one after the other
    loads    those that come back from the host, after that and before copies of states
    is_idle  whether all requests of the step are those of other ranks, which share feed-forwards
              with this one; `scheduled` is empty then
    """

    step: int
    starts: list[RowStart]
    scheduled: list[ScheduledTokens]
    ends: list[int] = []
    adapters: list[tuple[int, str]] = []
    adapter_copies: list[str] = []
    forgets: list[bytes] = []
    encodes: list[Medium] = []
    saves: list[CopiedPage] = []
    loads: list[CopiedPage] = []
    is_idle: bool = False


IDLE_STEP = StepPlan(step=-1, starts=[], scheduled=[], is_idle=True)


class EntryLogprobs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Log probabilities of one entry of `scheduled`.

    output  log probabilities of the tokens that the entry brought
    prompt  log probabilities of the prompt tokens that follow the entry's scored tokens
    """

    output: TokenLogprobs | None = None
    prompt: TokenLogprobs | None = None


class GuessedTokens(msgspec.Struct, frozen=True):
    """How a request may go on after its last token.

    parents  of a tree of guesses, as in schema/draft_tree.py; empty: a chain. The likeliest way
             through the tree comes first
    """

    token_ids: list[int]
    parents: list[int] = []


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """The sampled token ids of each entry of `scheduled` that samples, in their order.

    An entry with drafts brings the drafts that were right and the token that was sampled after
    them; an entry without brings one token.

    All other fields are by the entry's index in `scheduled`:

    logprobs  of the entries that want some
    hidden_states  of the entries that want some: fp32, little endian, one piece per token, those of
              wrong drafts left out
    routed_experts  the same for the experts that computed a token: int32 [layers, experts of a
              token], little endian
    failures  why an entry's request cannot go on, though others can; the entry brings the tokens
              before that, if there are any
    pauses    seconds during which an entry's request shall not step, because its grammar is slow
    values    embedding or scores of an entry that answers: fp32, little endian
    forced    tokens that must follow the sampled ones because the grammar leaves no choice; they
              are not computed yet
    guesses   of the tokens that follow, as far as the entry asks for them (`num_guesses`)
    drafting_s  seconds that the rank's draft model took, in a step that asked for guesses
    encoding_s  seconds that the rank's tower took, in a step with media to encode
    """

    step: int
    token_ids: list[list[int]]
    logprobs: dict[int, EntryLogprobs] = {}
    hidden_states: dict[int, list[bytes]] = {}
    routed_experts: dict[int, list[bytes]] = {}
    failures: dict[int, str] = {}
    pauses: dict[int, float] = {}
    values: dict[int, bytes] = {}
    forced: dict[int, list[int]] = {}
    guesses: dict[int, GuessedTokens] = {}
    drafting_s: float = 0.0
    encoding_s: float = 0.0


class StepHandle(Protocol):
    """A step that has been started; a concurrent.futures.Future is such a handle too."""

    def result(self) -> StepResult:
        """Wait for the step and return what it sampled; raises what the step raised."""
        ...
