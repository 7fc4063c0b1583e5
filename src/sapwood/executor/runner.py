"""Executes plans on one rank."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sapwood.executor.cache_inputs import CachePlaces
from sapwood.executor.drafting import Drafter, sampled_entries
from sapwood.executor.inputs import ONE_GROUP, StepInputs, build_inputs
from sapwood.executor.open_ends import OpenEnds
from sapwood.executor.per_token import RoutedExperts, ToldRows, kept_rows
from sapwood.executor.recorded import RecordedSteps
from sapwood.executor.rows import RowTable
from sapwood.executor.sampling.logprobs import LogprobRecorder, Measured, by_entry
from sapwood.executor.sampling.sampler import Sampler
from sapwood.executor.sampling.spans import choose_spans
from sapwood.executor.sight import Sight
from sapwood.executor.step_adapters import StepAdapterPool, change_slots, knowing_adapters
from sapwood.executor.trees import TreeMover
from sapwood.kernels.recording import Program
from sapwood.kernels.transfer import Download, download, upload_one
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.schema.step import GuessedTokens, ScheduledTokens, StepPlan, StepResult


class DecoderModel(Protocol):
    def compute(self, batch: ForwardBatch) -> Tensor:
        """Logits [S, vocab] of the rows at batch.logits_index; writes the KV of all tokens."""
        ...

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states of all tokens after the last norm, [T, hidden]; writes their KV."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab], in fp32"""
        ...

    def program(self, states: Collection[int] | None = None) -> Program:
        """`compute` as a program, to be recorded; CannotRecord if it is none.

        states  as in models.lm.decoder.Decoder.program"""
        ...


@dataclass(slots=True, eq=False)
class Launched:
    """A step in flight. Its device may be busy with it, or with an earlier step.

    rows        rows of the requests that sample a token, in the plan's order
    epochs      the epoch of each of these rows (see RowTable) when its token was sampled
    tokens      [len(rows)] tokens on their way to the host
    token_ids   the tokens of each of these rows, once they are accepted
    of_outputs  log probabilities of output tokens, by index in `rows`
    of_prompts  log probabilities of prompt tokens, by index in the plan
    hidden      hidden states, by index in the plan
    routed      experts that computed tokens, by index in the plan
    failures    by row: why its request cannot go on
    pauses      by row: seconds during which its request shall not step
    jumps       by row: tokens that must follow because the grammar leaves no choice
    guesses     of the tokens that follow, by index in the plan
    drafting_s  seconds that they took
    encoding_s  seconds that the tower took
    states      of the model, for the drafter; None: it takes none
    """

    plan: StepPlan
    collect: Callable[[Launched], None]
    rows: Sequence[int] = ()
    epochs: Sequence[int] = ()
    tokens: Download | None = None
    token_ids: list[list[int]] | None = None
    of_outputs: Mapping[int, Measured] = field(default_factory=dict)
    of_prompts: Mapping[int, Measured] = field(default_factory=dict)
    hidden: dict[int, ToldRows] = field(default_factory=dict)
    routed: dict[int, ToldRows] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    pauses: dict[int, float] = field(default_factory=dict)
    jumps: Mapping[int, list[int]] = field(default_factory=dict)
    guesses: dict[int, GuessedTokens] = field(default_factory=dict)
    drafting_s: float = 0.0
    encoding_s: float = 0.0
    states: Tensor | None = None

    def done(self) -> bool:
        """Whether the launch has waited for the tokens already."""
        return self.token_ids is not None

    def result(self) -> StepResult:
        """Wait for this step and for all earlier steps."""
        self.collect(self)
        assert self.token_ids is not None, "the step was collected"
        plan = self.plan
        told = (self.of_outputs, self.of_prompts, self.hidden, self.routed, self.pauses)
        if not any(
            (*told, self.failures, self.jumps, self.guesses, self.drafting_s, self.encoding_s)
        ):
            return StepResult(step=plan.step, token_ids=self.token_ids)
        scheduled = list(enumerate(plan.scheduled))
        sampling = [index for index, entry in scheduled if entry.num_output is not None]
        return StepResult(
            step=plan.step,
            token_ids=self.token_ids,
            logprobs=by_entry(
                sampling,
                {index: found.tell() for index, found in self.of_outputs.items()},
                {index: found.tell() for index, found in self.of_prompts.items()},
            ),
            hidden_states={index: found.tell() for index, found in self.hidden.items()},
            routed_experts={index: found.tell() for index, found in self.routed.items()},
            failures={
                index: self.failures[entry.row]
                for index, entry in scheduled
                if entry.row in self.failures
            },
            pauses={
                index: self.pauses[entry.row]
                for index, entry in scheduled
                if entry.row in self.pauses
            },
            forced={
                index: self.jumps[entry.row]
                for index, entry in scheduled
                if entry.row in self.jumps
            },
            guesses=self.guesses,
            drafting_s=self.drafting_s,
            encoding_s=self.encoding_s,
        )


class Runner:
    """A model, the memory of its KV pages, and a row of state per running request.

    The next step may be launched while a step is in flight: the tokens stay on the device, where
    the next step finds them, and are copied to the host meanwhile. Only a stateful row is
    sampled after the host knows its earlier tokens, because a grammar or a penalty depends on them.
    Its forward pass need not wait: the wait comes between that and the sampling.
    """

    def __init__(
        self,
        model: DecoderModel,
        recorded: RecordedSteps,
        *,
        kv_caches: Sequence[tuple[Tensor, ...]],
        rows: RowTable,
        sampler: Sampler,
        page_size: int,
        device: torch.device,
        places: CachePlaces = ONE_GROUP,
        routed_experts: RoutedExperts | None = None,
        adapters: StepAdapterPool | None = None,
        drafter: Drafter | None = None,
        download: Callable[[Tensor], Download] = download,
        share: Callable[[Tensor], Tensor] | None = None,
        record_anew: Callable[[], RecordedSteps] | None = None,
        sight: Sight | None = None,
    ) -> None:
        """A runner of one rank.

        places    tells where the model's cache groups find their pages and states
        routed_experts  tells which experts computed a token; None: no request wants to know
        adapters  has the LoRA adapters of requests; None: no request has one
        drafter   guesses tokens with a draft model; None: no plan asks for guesses
        download  copies tokens and log probabilities to the host
        share     makes the tokens that rank 0 has chosen those of every rank, before anybody else
                  knows them; None: this is the only rank, or every plan brings its tokens
        record_anew  records the steps again, with the weights that the model has by then
        sight     encodes what prompts show; None: no prompt shows anything
        """
        self._record_anew = record_anew
        self._share = share
        self._sight = sight
        self._model = model
        self._recorded = recorded
        self._kv_caches = kv_caches
        self._places = places
        self._routed_experts = routed_experts
        self._adapters = adapters
        self._drafter = drafter
        self._rows = rows
        self._sampler = sampler
        self._download = download
        self._logprobs = LogprobRecorder(device, download=download)
        self._page_size = page_size
        self._device = device
        self._uncollected: deque[Launched] = deque()
        self._mover: TreeMover | None = None
        self._open_ends = OpenEnds()

    @property
    def kv_caches(self) -> Sequence[tuple[Tensor, ...]]:
        return self._kv_caches

    def renew(self) -> None:
        """Record the steps anew, after the model was filled again."""
        if self._record_anew is not None:
            self._recorded = self._record_anew()

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step and wait for it; plans come in the order in which they were made."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Queue one step behind all earlier steps."""
        plan = self._open_ends.followed(plan)
        launched = Launched(plan, self._collect_through)
        self._uncollected.append(launched)
        for row in plan.ends:
            self._sampler.end(row)
        change_slots(self._adapters, plan)
        if self._sight is not None:
            launched.encoding_s = self._sight.follow(plan)
        if not plan.scheduled:
            return launched
        for start in plan.starts:
            self._rows.start(start)
            if self._sight is not None:
                self._sight.start(start, self._rows)
            self._sampler.start(start)
            self._logprobs.start(start)
        for entry in plan.scheduled:
            self._rows.take_pages(entry)
        self._places.copy_states(plan.scheduled, self._kv_caches, self._device)
        inputs = build_inputs(
            plan,
            self._rows,
            page_size=self._page_size,
            kv_caches=self._kv_caches,
            device=self._device,
            places=self._places,
            adapters=None if self._adapters is None else self._adapters.of_step,
            sight=self._sight,
        )
        with knowing_adapters(self._adapters, inputs.batch):
            logits = self._compute(launched, inputs.batch)
        if inputs.sampling:
            self._sample(launched, inputs, logits)
        if self._drafter is not None:
            self._draft(self._drafter, launched, inputs.batch)
            launched.states = None
            if launched.token_ids is not None:
                self._open_ends.note(plan, launched.token_ids, launched.guesses)
        # At once, lest they be taken for those of a step that is collected later.
        launched.failures = self._sampler.take_failures()
        launched.pauses = self._sampler.take_pauses()
        return launched

    def _sample(self, launched: Launched, inputs: StepInputs, logits: Tensor) -> None:
        rows = [entry.row for entry in inputs.sampling]
        if any(one.draft_ids or one.num_guesses or one.follows for one in inputs.sampling):
            self._sample_spans(launched, inputs, logits)
            return
        num_outputs = [entry.num_output or 0 for entry in inputs.sampling]
        if self._awaits_tokens(rows):
            self._collect_before(launched)
        kept = self._logprobs.keep(logits, rows)
        chosen = self._sampler.sample(logits, rows, num_outputs)
        if self._share is not None:
            chosen = self._share(chosen)
        self._rows.last_tokens.index_copy_(0, inputs.sampling_rows, chosen)
        launched.rows = rows
        launched.epochs = [self._rows.epochs[row] for row in rows]
        launched.tokens = self._download(chosen)
        if kept is not None:
            launched.of_outputs = self._logprobs.of_output(kept, rows, chosen)

    def _draft(self, drafter: Drafter, launched: Launched, batch: ForwardBatch) -> None:
        """Let the draft model compute the step's tokens too, and guess."""
        if launched.token_ids is None:
            drafter.follow(launched.plan, batch, launched.states)
            return
        sampled = sampled_entries(launched.plan, launched.token_ids, launched.jumps)
        start_s = time.perf_counter()
        launched.guesses = drafter.guess(launched.plan, batch, launched.states, sampled)
        launched.drafting_s = time.perf_counter() - start_s

    def _sample_spans(self, launched: Launched, inputs: StepInputs, logits: Tensor) -> None:
        """Sample a step with drafts, one that asks for guesses, or one that follows such a step.
        Nobody knows how far its requests have come before its tokens are on the host, so the launch
        waits for them."""
        entries = inputs.sampling
        self._collect_before(launched)
        self._uncollected.popleft()
        # One per place that is sampled, of which an entry with drafts has several.
        rows = [entry.row for entry in entries for _ in entry.logits_for]
        kept = self._logprobs.keep(logits, rows)
        chosen = choose_spans(self._sampler, logits, entries)
        if any(entry.draft_parents for entry in entries):
            self._move(launched, entries, chosen)
        last = upload_one([(tokens or [0])[-1] for tokens in chosen], np.int64, self._device)
        self._rows.last_tokens.index_copy_(0, inputs.sampling_rows, last)
        launched.token_ids = chosen
        stateful = self._sampler.stateful_rows(rows)
        if stateful:
            launched.jumps = self._sampler.jump([e.row for e in entries if e.row in stateful])
        if kept is not None:
            launched.of_outputs = self._logprobs.of_spans(kept, rows, entries, chosen)

    def _move(
        self,
        launched: Launched,
        entries: Sequence[ScheduledTokens],
        chosen: Sequence[Sequence[int]],
    ) -> None:
        """Let what right drafts of trees left behind lie as that of chains does."""
        if self._mover is None:
            self._mover = TreeMover(self._rows, self._kv_caches)
        moved = self._mover.move(entries, chosen)
        of_row = {entries[index].row: moves for index, moves in moved.items()}
        for index, entry in enumerate(launched.plan.scheduled):
            moves = of_row.get(entry.row)
            for told in (launched.hidden, launched.routed):
                if moves and index in told:
                    told[index] = replace(told[index], moves=moves, num_drafts=len(entry.draft_ids))

    def _compute(self, launched: Launched, batch: ForwardBatch) -> Tensor:
        """Logits [S, vocab] of the rows at batch.logits_index.

        Prompts' log probabilities, and what is told of tokens, are put into `launched`.
        """
        scheduled = launched.plan.scheduled
        num_hidden = [entry.num_hidden for entry in scheduled]
        num_routed = [entry.num_routed for entry in scheduled]
        routed_experts = self._routed_experts
        tells_experts = routed_experts is not None and (
            any(num_routed) or routed_experts.are_recorded
        )
        if not (self._logprobs.scores(scheduled) or any(num_hidden) or tells_experts):
            states = None if self._drafter is None else self._drafter.new_states(batch)
            logits = self._recorded.replay(batch, states)
            if logits is not None:
                launched.states = states
                return logits
            if states is None:
                return self._model.compute(batch)
        # Recorded steps compute no logits but those from which tokens are sampled.
        if routed_experts is None or not tells_experts:
            hidden = self._forward(launched, batch)
        else:
            with routed_experts.log.open():
                hidden = self._forward(launched, batch)
                routed = routed_experts.of_step(batch)
            launched.routed = kept_rows(scheduled, num_routed, routed, self._download)
        launched.of_prompts = self._logprobs.of_prompts(scheduled, hidden, self._prompt_logits)
        if any(num_hidden):
            launched.hidden = kept_rows(scheduled, num_hidden, hidden.float(), self._download)
        return self._model.logits(hidden.index_select(0, batch.logits_index))

    def _forward(self, launched: Launched, batch: ForwardBatch) -> Tensor:
        """Hidden states [T, hidden] after the last norm."""
        if self._drafter is None or not self._drafter.takes_states:
            return self._model.forward(batch)
        hidden, launched.states = self._drafter.states_of(batch)
        return hidden

    def _prompt_logits(self, hidden: Tensor, row: int, position: int) -> Tensor:
        """Logits [n, vocab] of hidden [n, hidden], of the tokens from `position` on of the request
        in this row."""
        if self._adapters is None:
            return self._model.logits(hidden)
        slot = int(self._rows.adapter_slots[row])
        first = max(int(self._rows.adapter_starts[row]) - position, 0)
        with self._adapters.context.scoring(slot, first, len(hidden), hidden.device):
            return self._model.logits(hidden)

    # ---- tokens that come to the host --------------------------------------------------------

    def _awaits_tokens(self, rows: Sequence[int]) -> bool:
        """Whether a token of a stateful row among `rows` is still on its way to the host."""
        stateful = self._sampler.stateful_rows(rows)
        return bool(stateful) and any(
            row in stateful and self._rows.epochs[row] == epoch
            for step in self._uncollected
            for row, epoch in zip(step.rows, step.epochs, strict=True)
        )

    def _collect_before(self, launched: Launched) -> None:
        while self._uncollected[0] is not launched:
            self._collect(self._uncollected.popleft())

    def _collect_through(self, launched: Launched) -> None:
        while launched.token_ids is None:
            self._collect(self._uncollected.popleft())

    @torch.inference_mode()
    def _collect(self, launched: Launched) -> None:
        """Wait for the step's tokens, and let the sampler accept those of stateful rows."""
        tokens: list[int] = [] if launched.tokens is None else launched.tokens.wait().tolist()
        launched.token_ids = [[token_id] for token_id in tokens]
        stateful = self._sampler.stateful_rows(launched.rows) if launched.rows else None
        if stateful:
            self._accept(launched, tokens, stateful)
        if launched.failures:
            launched.token_ids = [
                [] if row in launched.failures else found
                for row, found in zip(launched.rows, launched.token_ids, strict=True)
            ]

    def _accept(self, launched: Launched, tokens: Sequence[int], stateful: set[int]) -> None:
        """Let the sampler accept the tokens of the stateful rows."""
        # Another request may have the row by now.
        own = [
            (row, token_id)
            for row, epoch, token_id in zip(launched.rows, launched.epochs, tokens, strict=True)
            if row in stateful and self._rows.epochs[row] == epoch
        ]
        if own:
            rows = [row for row, _ in own]
            self._sampler.accept(rows, [token_id for _, token_id in own])
            launched.jumps = self._sampler.jump(rows)
            launched.failures |= self._sampler.take_failures()
            launched.pauses |= self._sampler.take_pauses()
