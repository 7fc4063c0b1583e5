"""A pretend rank for tests of the scheduler: it really keeps "KV" in pages, but has no model.

In the pool that keeps every token, writing a token's KV stores the token's id in its page; sampling
reads the whole context back out of the pages that the row's table names, and hashes it into the
next token. A page with two owners, a stale table or a wrong position therefore changes the output,
and is noticed. In the other pools a place remembers the whole prefix that it was computed from: a
step that finds another prefix there than its request's fails at once.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from sapwood.executor.open_ends import OpenEnds
from sapwood.schema.cache import FULL_POOL, CacheKind, CachePool
from sapwood.schema.step import GuessedTokens, ScheduledTokens, StepPlan, StepResult
from sapwood.speculative.interface import Guesses

VOCAB = 50
NO_ID = -1
"""A token of a prompt that is known by its vector alone."""


def next_token(context: list[int]) -> int:
    digest = hashlib.blake2b(str(context).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCAB


def expected_outputs(prompt_ids: list[int], max_new_tokens: int, eos: set[int]) -> list[int]:
    """What a request must put out, whatever the schedule."""
    context = list(prompt_ids)
    outputs: list[int] = []
    while len(outputs) < max_new_tokens:
        token = next_token(context)
        outputs.append(token)
        context.append(token)
        if token in eos:
            break
    return outputs


class SometimesRight:
    """A drafter that knows the model, and makes mistakes."""

    def begin(self, namespace: str, prompt_ids: Sequence[int]) -> SometimesRightDraft:
        return SometimesRightDraft(list(prompt_ids))


@dataclass
class SometimesRightDraft:
    context: list[int]

    def extend(self, token_ids: Sequence[int]) -> None:
        self.context += token_ids

    def propose(self, most: int) -> Guesses:
        guessed = list(self.context)
        for _ in range(most):
            token = next_token(guessed)
            guessed.append(token if (token + len(guessed)) % 5 else (token + 1) % VOCAB)
        token_ids = guessed[len(self.context) :]
        return Guesses(token_ids=token_ids, kinds=range(len(token_ids)))

    def close(self) -> None:
        pass


@dataclass
class Row:
    """tokens: all that the request has so far, sampled ones included; adapter: (slot, id).

    num_sure: of these tokens; where another stage samples, later ones are drafts, of which a plan
    tells how many were right by the position that it goes on from"""

    tokens: list[int]
    adapter: tuple[int, str] = (-1, "")
    num_sure: int = 1 << 30
    pages: list[int] = field(default_factory=list)
    windows: dict[int, dict[int, int]] = field(default_factory=dict)
    last_token: int = -1

    @staticmethod
    def may_be(known: int, token_id: int) -> bool:
        return known in (token_id, NO_ID)


class SimulatedRank:
    """Executes plans in order; `depth` results may be outstanding."""

    def __init__(
        self,
        num_pages: int | list[int],
        page_size: int,
        pools: Sequence[CachePool] = (FULL_POOL,),
        host_sizes: Sequence[int] = (),
    ) -> None:
        self._page_size = page_size
        self._host: list[list[object]] = [[None] * size for size in host_sizes]
        sizes = [num_pages] if isinstance(num_pages, int) else num_pages
        kinds = {pool.kind: size for pool, size in zip(pools, sizes, strict=True)}
        num_full = kinds.get(CacheKind.FULL)
        self._kv: list[list[int | None]] | None = (
            None if num_full is None else [[None] * page_size for _ in range(num_full)]
        )
        self._windows = [
            (pool.window, [[None] * page_size for _ in range(size)])
            for pool, size in zip(pools, sizes, strict=True)
            if pool.window is not None
        ]
        self._states: list[int | None] = [None] * kinds.get(CacheKind.STATE, 0)
        windows = iter(self._windows)
        self._of_pool: list[list[Any]] = []
        for pool in pools:
            if pool.window is not None:
                self._of_pool.append(next(windows)[1])
            else:
                full = self._kv if pool.kind is CacheKind.FULL else self._states
                assert full is not None
                self._of_pool.append(full)
        self._rows: dict[int, Row] = {}
        self._adapters: dict[int, str] = {}
        self._open_ends = OpenEnds()
        self.computed: list[int] = []
        """Tokens computed per step."""
        self.is_last = True
        """Whether it samples; a stage that does not must be told every token."""
        self.pause_s = 0.0
        """How long a request pauses after some of its tokens, as with a slow grammar."""

    def execute(self, plan: StepPlan) -> StepResult:
        plan = self._open_ends.followed(plan)
        self._adapters.update(plan.adapters)
        for start in plan.starts:
            # The ids of a prompt of vectors are not told; they come with the steps.
            embeds = start.input_embeds
            prompt_ids = [NO_ID] * len(embeds) if embeds else start.prompt_ids
            adapter = (start.adapter_slot, start.options.adapter)
            self._rows[start.row] = Row([*prompt_ids, *start.output_ids], adapter)
        num_new = [entry.num_new for entry in plan.scheduled]
        assert num_new == sorted(num_new, key=lambda count: count != 1), "decodes come first"
        self.computed.append(sum(num_new))
        self._move(plan)
        self._copy(plan)
        for entry in plan.scheduled:
            self._write(entry, self._rows[entry.row])
        sampled: list[list[int]] = []
        guesses: dict[int, GuessedTokens] = {}
        for index, entry in enumerate(plan.scheduled):
            row = self._rows[entry.row]
            slot, adapter = row.adapter
            assert self._adapters.get(slot, "") == adapter, "the slot has another adapter"
            self._look_back(entry, row)
            context = self._context(entry, row)
            if entry.num_output is None:
                continue
            first = entry.position + entry.logits_for.start
            if not self.is_last:
                row.num_sure = first + 1
                continue
            brought = [next_token(context[: first + 1])]
            while context[first + len(brought) :][:1] == brought[-1:]:
                brought.append(next_token(context[: first + len(brought) + 1]))
            row.last_token = brought[-1]
            row.tokens[first + 1 :] = brought
            sampled.append(brought)
            if entry.num_guesses:
                guesses[index] = self._guess(
                    row, min(entry.guesses_end, len(row.tokens) + entry.num_guesses)
                )
        if self.is_last:
            self._open_ends.note(plan, sampled, guesses)
        pauses = {
            index: self.pause_s
            for index, entry in enumerate(plan.scheduled)
            if self.pause_s and entry.num_output is not None and entry.position % 3 == 0
        }
        return StepResult(step=plan.step, token_ids=sampled, guesses=guesses, pauses=pauses)

    def _guess(self, row: Row, end: int) -> GuessedTokens:
        """Tokens up to `end`. Spoils what a draft model would write to in order to guess them."""
        num_known = len(row.tokens)
        for place in range(num_known - 1, end - 1):
            page, slot = divmod(place, self._page_size)
            if self._kv is not None:
                self._kv[row.pages[page]][slot] = None
            for index, (_, pages) in enumerate(self._windows):
                pages[row.windows[index][page]][slot] = None
        guesses = SometimesRightDraft(row.tokens).propose(max(end - num_known, 0))
        return GuessedTokens(list(guesses.token_ids))

    def _move(self, plan: StepPlan) -> None:
        """What goes to the host, and comes back."""
        for save in plan.saves:
            self._host[save.pool][save.target] = copy(self._of_pool[save.pool][save.source])
        for load in plan.loads:
            found = self._host[load.pool][load.source]
            assert found is not None, "a slot of the host that was never written"
            self._of_pool[load.pool][load.target] = copy(found)

    def _copy(self, plan: StepPlan) -> None:
        copies = [one for entry in plan.scheduled for one in entry.copies]
        contents = [self._states[source] for source, _ in copies]
        targets = [target for _, target in copies]
        assert len(set(targets)) == len(targets), "two copies into one slot"
        for target, content in zip(targets, contents, strict=True):
            self._states[target] = content

    def _write(self, entry: ScheduledTokens, row: Row) -> None:
        row.pages[entry.first_page :] = entry.pages
        assert entry.token_ids or self.is_last, "the token was sampled by another stage"
        del row.tokens[max(row.num_sure, entry.position) :]
        token_ids = [*(entry.token_ids or [row.last_token]), *entry.draft_ids]
        known = row.tokens[entry.position : entry.end - len(entry.draft_ids)]
        assert len(known) <= len(token_ids)
        assert all(map(row.may_be, known, token_ids)), "other tokens than the request's"
        # What a grammar forced was never sampled, and a prompt of vectors has no ids.
        row.tokens[entry.position : entry.end] = token_ids
        if self._kv is not None:
            for offset, token in enumerate(token_ids):
                page, slot = divmod(entry.position + offset, self._page_size)
                self._kv[row.pages[page]][slot] = token
        for index, (first, pages) in enumerate(entry.windows):
            table = row.windows.setdefault(index, {})
            table.update(enumerate(pages, start=first))
            for position in range(entry.position, entry.end):
                page, slot = divmod(position, self._page_size)
                self._windows[index][1][table[page]][slot] = prefix(row, position + 1)
        if self._states:
            if entry.position:
                found = self._states[entry.slot]
                assert found == prefix(row, entry.position), "the state of another prefix"
            self._states[entry.slot] = prefix(row, entry.end)

    def _look_back(self, entry: ScheduledTokens, row: Row) -> None:
        """What the step's tokens find in their windows, once all of them are written."""
        for index, (window, pages) in enumerate(self._windows):
            for position in range(max(entry.position - window + 1, 0), entry.end):
                page, slot = divmod(position, self._page_size)
                found = pages[row.windows[index][page]][slot]
                assert found == prefix(row, position + 1), "a window page of another prefix"

    def _context(self, entry: ScheduledTokens, row: Row) -> list[int]:
        if self._kv is None:
            return row.tokens[: entry.end]
        places = [divmod(position, self._page_size) for position in range(entry.end)]
        context = [self._kv[row.pages[page]][slot] for page, slot in places]
        assert None not in context, "read KV that was never written"
        return [token for token in context if token is not None]


def prefix(row: Row, num_tokens: int) -> int:
    """Stands for the first tokens of a request."""
    assert num_tokens <= len(row.tokens)
    return hash(tuple(row.tokens[:num_tokens]))


class DelayedExecutor:
    """A `launch` whose handle computes only when its result is asked for, in launch order.

    stages  those before the rank's: they compute each plan as soon as it is launched"""

    def __init__(self, rank: SimulatedRank, stages: Sequence[SimulatedRank] = ()) -> None:
        self._rank = rank
        self._stages = stages
        self._queue: deque[StepPlan] = deque()
        self._results: dict[int, StepResult] = {}

    def launch(self, plan: StepPlan) -> DelayedHandle:
        for stage in self._stages:
            stage.execute(plan)
        self._queue.append(plan)
        return DelayedHandle(self, plan.step)

    def result_of(self, step: int) -> StepResult:
        while step not in self._results:
            plan = self._queue.popleft()
            self._results[plan.step] = self._rank.execute(plan)
        return self._results.pop(step)

    def close(self) -> None:
        self._queue.clear()


@dataclass
class DelayedHandle:
    executor: DelayedExecutor
    step: int

    def result(self) -> StepResult:
        return self.executor.result_of(self.step)
