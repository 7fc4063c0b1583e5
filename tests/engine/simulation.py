"""A pretend rank for tests of the scheduler: it really keeps "KV" in pages, but has no model.

Writing a token's KV stores the token's id in its page; sampling reads the whole context back out of
the pages that the row's table names, and hashes it into the next token. A page with two owners, a
stale table or a wrong position therefore changes the output, and is noticed.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass, field

from sapwood.schema.step import StepPlan, StepResult

VOCAB = 50


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


@dataclass
class Row:
    pages: list[int] = field(default_factory=list)
    last_token: int = -1


class SimulatedRank:
    """Executes plans in order; `depth` results may be outstanding."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._page_size = page_size
        self._kv: list[list[int | None]] = [[None] * page_size for _ in range(num_pages)]
        self._rows: dict[int, Row] = {}
        self.computed: list[int] = []
        """Tokens computed per step."""

    def execute(self, plan: StepPlan) -> StepResult:
        for start in plan.starts:
            self._rows[start.row] = Row()
        num_new = [entry.num_new for entry in plan.scheduled]
        assert num_new == sorted(num_new, key=lambda count: count != 1), "decodes come first"
        self.computed.append(sum(num_new))
        sampled: list[int] = []
        for entry in plan.scheduled:
            row = self._rows[entry.row]
            row.pages[entry.first_page :] = entry.pages
            token_ids = entry.token_ids or [row.last_token]
            for offset, token in enumerate(token_ids):
                page, slot = divmod(entry.position + offset, self._page_size)
                self._kv[row.pages[page]][slot] = token
        for entry in plan.scheduled:
            if entry.num_output is None:
                continue
            row = self._rows[entry.row]
            length = entry.position + entry.num_new
            places = [divmod(position, self._page_size) for position in range(length)]
            context = [self._kv[row.pages[page]][slot] for page, slot in places]
            assert None not in context, "read KV that was never written"
            row.last_token = next_token([token for token in context if token is not None])
            sampled.append(row.last_token)
        return StepResult(step=plan.step, token_ids=sampled)


class DelayedExecutor:
    """A `launch` whose handle computes only when its result is asked for, in launch order."""

    def __init__(self, rank: SimulatedRank) -> None:
        self._rank = rank
        self._queue: deque[StepPlan] = deque()
        self._results: dict[int, StepResult] = {}

    def launch(self, plan: StepPlan) -> DelayedHandle:
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
