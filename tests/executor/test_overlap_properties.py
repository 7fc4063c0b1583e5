"""Steps that overlap on a simulated asynchronous device put out what steps one at a time do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sapwood.base.channel import CallbackSender, QueueChannel
from sapwood.base.clock import ManualClock
from sapwood.engine.loop import EngineLoop, StepExecutor
from sapwood.engine.scheduler import Scheduler
from sapwood.engine.speculation import Speculation
from sapwood.executor.drafting import Sampled
from sapwood.executor.grammar.interface import GrammarFailed
from sapwood.executor.grammar.masks import GrammarMasks
from sapwood.executor.launch import OverlappedLaunches, QueuedExecutor, SerialExecutor
from sapwood.executor.recorded import NothingRecorded
from sapwood.executor.rows import RowTable
from sapwood.executor.runner import Launched, Runner
from sapwood.executor.sampling.processors import LogitBias, MinNewTokens, Penalties
from sapwood.executor.sampling.sampler import Sampler
from sapwood.executor.sampling.thinking_budget import ThinkingBudgets
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.memory.eviction import least_recently_used
from sapwood.memory.ledger import Ledger
from sapwood.memory.prefix_tree import PrefixTree
from sapwood.schema import grammar as grammars
from sapwood.schema.config.scheduler import SchedulerConfig
from sapwood.schema.grammar import Grammar
from sapwood.schema.logprobs import LogprobOptions, TokenLogprobs
from sapwood.schema.output import EngineOutput, Finish, StepOutputs
from sapwood.schema.rank import CompileGrammar, GrammarAnswer, RankMessage
from sapwood.schema.request import Abort, EngineInput, Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import GuessedTokens, StepPlan, TokenFeed
from sapwood.schema.thinking import ThinkingBudget
from sapwood.speculative.interface import Guesses
from tests.executor.hashing_model import VOCAB, HashingModel, make_pages
from tests.executor.simulated_device import SimulatedDevice
from tests.executor.simulated_pipeline import SimulatedPipeline
from tests.tiers import examples

CPU = torch.device("cpu")
EOS = 5
CONTEXT = 40


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class SumMatcher:
    """Allows the tokens that the sum of those before leads to, and the end from time to time."""

    def __init__(self, name: str) -> None:
        self._modulus = 2 + len(name) % 3
        self._fails_at = 4 if name.startswith("failing") else None
        self._taken: list[int] = []

    @property
    def has_ended(self) -> bool:
        return EOS in self._taken

    def _allows(self, token_id: int) -> bool:
        if token_id == EOS:
            return sum(self._taken) % 5 == 4
        return token_id % self._modulus == sum(self._taken) % self._modulus

    def fill(self, masks: np.ndarray, index: int) -> None:
        if len(self._taken) == self._fails_at:
            raise GrammarFailed("it fails at its fifth token")
        bits = sum(1 << token_id for token_id in range(VOCAB) if self._allows(token_id))
        masks[index, 0] = np.uint32(bits).astype(np.int32)

    def accept(self, token_id: int) -> bool:
        if not self._allows(token_id):
            return False
        self._taken.append(token_id)
        return True

    def rollback(self, num_tokens: int) -> None:
        del self._taken[len(self._taken) - num_tokens :]


@dataclass
class CompiledSum:
    name: str
    num_bytes: int = 1

    def matcher(self) -> SumMatcher:
        return SumMatcher(self.name)


class ReadyGrammars:
    """For the scheduler and the masks."""

    num_ranks = 1

    def __init__(self) -> None:
        self._answers: list[GrammarAnswer] = []

    def send(self, message: RankMessage) -> None:
        if isinstance(message, CompileGrammar):
            self._answers.append(GrammarAnswer(id=message.id, rank=0))

    def answers(self) -> list[GrammarAnswer]:
        answers, self._answers = self._answers, []
        return answers

    def compiled(self, grammar: Grammar) -> CompiledSum:
        return CompiledSum(grammar.text)


@dataclass(frozen=True)
class Asked:
    """A request, and the turns at which it comes and is aborted."""

    prompt: list[int]
    sampling: SamplingParams
    logprobs: LogprobOptions | None
    arrives: int
    aborted: int | None


THINKING = ThinkingBudget(begin=(1,), end=(2,), forced=(3, 2), max_tokens=2, is_open=True)
GRAMMARS = [grammars.regex(text) for text in ("a", "bb", "ccc", "failing")]


@st.composite
def requests(draw: st.DrawFn) -> Asked:
    constrained = draw(st.sampled_from([None, None, *GRAMMARS]))
    special: dict[str, Any] = draw(
        st.sampled_from(
            [
                {},
                {},
                {"presence_penalty": 1.5},
                {"frequency_penalty": 0.7, "repetition_penalty": 1.4},
                {"thinking_budget": THINKING},
                {"logit_bias": {7: 3.0}},
            ]
        )
    )
    sampling = SamplingParams(
        max_new_tokens=draw(st.integers(1, 10)),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 9)),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        stop_token_ids=draw(st.sampled_from([(), (9, 10)])),
        ignore_eos=constrained is None and draw(st.booleans()),
        min_new_tokens=0 if constrained else draw(st.sampled_from([0, 0, 1])),
        grammar=constrained,
        **special,
    )
    stem = draw(st.sampled_from([[], [4, 8, 15, 16, 11, 3, 4, 2]]))
    prompt = stem + draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9))
    return Asked(
        prompt=prompt,
        sampling=sampling,
        logprobs=draw(
            st.sampled_from(
                [
                    None,
                    None,
                    LogprobOptions(num_top=2, token_ids=(4, 6)),
                    LogprobOptions(prompt_start=min(1, len(prompt) - 1)),
                ]
            )
        ),
        arrives=draw(st.integers(0, 10)),
        aborted=draw(st.none() | st.none() | st.integers(0, 25)),
    )


@dataclass(frozen=True)
class Layout:
    page_size: int
    num_tokens: int
    chunk: int
    max_running: int
    prefixes: bool
    depth: int
    seed: int
    drafts: int = 0
    by_rank: bool = False
    stages: int = 1


LAYOUTS = st.builds(
    Layout,
    page_size=st.sampled_from([1, 2, 4]),
    num_tokens=st.integers(30, 90),
    chunk=st.sampled_from([2, 5, 32, -1]),
    max_running=st.integers(1, 4),
    prefixes=st.booleans(),
    depth=st.sampled_from([2, 2, 2, 3]),
    seed=st.integers(0, 3),
    drafts=st.sampled_from([0, 1, 6]),
    by_rank=st.booleans(),
    stages=st.sampled_from([1, 1, 2, 3]),
)


class HalfKnown:
    """A drafter that knows what some prompts lead to, but for a mistake here and there.

    outputs  prompt -> output tokens
    """

    def __init__(self, outputs: Mapping[tuple[int, ...], Sequence[int]]) -> None:
        self._outputs = outputs

    def begin(self, namespace: str, prompt_ids: Sequence[int]) -> HalfKnownDraft:
        return HalfKnownDraft(self._outputs[tuple(prompt_ids)])


@dataclass
class HalfKnownDraft:
    output_ids: Sequence[int]
    num_told: int = 0

    def extend(self, token_ids: Sequence[int]) -> None:
        self.num_told += len(token_ids)

    def propose(self, most: int) -> Guesses:
        following = list(enumerate(self.output_ids))[self.num_told :][:most]
        token_ids = [token if (token + at) % 4 else (token + 1) % VOCAB for at, token in following]
        return Guesses(token_ids=token_ids, kinds=range(len(token_ids)))

    def close(self) -> None:
        pass


class HalfKnownOnRank:
    """The same, on the rank. It overwrites what a draft model would write to.

    outputs  prompt -> output tokens
    stored   [num_pages, page_size], the tokens whose keys are in the pages
    """

    takes_states = False

    def __init__(
        self, outputs: Mapping[tuple[int, ...], Sequence[int]], rows: RowTable, stored: Tensor
    ) -> None:
        self._outputs = outputs
        self._rows = rows
        self._stored = stored
        self._prompts: dict[int, list[int]] = {}

    def new_states(self, batch: ForwardBatch) -> None:
        return None

    def states_of(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        raise AssertionError("it takes no states")

    def follow(self, plan: StepPlan, batch: ForwardBatch, states: Tensor | None) -> None:
        self._prompts |= {begun.row: begun.prompt_ids for begun in plan.starts}

    def guess(
        self,
        plan: StepPlan,
        batch: ForwardBatch,
        states: Tensor | None,
        sampled: Sequence[Sampled],
    ) -> dict[int, GuessedTokens]:
        self.follow(plan, batch, states)
        found: dict[int, GuessedTokens] = {}
        for one in sampled:
            if one.num_guesses:
                prompt = self._prompts[one.entry.row]
                draft = HalfKnownDraft(self._outputs[tuple(prompt)], one.num_known - len(prompt))
                guesses = draft.propose(one.num_guesses)
                found[one.index] = GuessedTokens(list(guesses.token_ids))
                for place in range(one.num_known - 1, one.num_known + one.num_guesses - 1):
                    page, offset = divmod(place, self._stored.shape[1])
                    self._stored[self._rows.page_table[one.entry.row, page], offset] = -1
        return found


class World:
    """A scheduler, a loop and a runner; where steps overlap, on a simulated device or at the end of
    a simulated pipeline."""

    def __init__(
        self,
        layout: Layout,
        *,
        depth: int,
        known: Mapping[tuple[int, ...], Sequence[int]] | None = None,
    ) -> None:
        """known  outputs by prompt, of which drafts are made; None: no drafts"""
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.finishes: dict[str, Finish] = {}
        self.plans: list[StepPlan] = []
        self.thread: OverlappedLaunches | None = None
        num_pages = layout.num_tokens // layout.page_size
        self.pipeline = None
        if depth > 1 and layout.stages > 1:
            self.pipeline = SimulatedPipeline.of(
                layout.stages,
                layout.seed,
                num_rows=layout.max_running,
                max_pages=CONTEXT,
                num_pages=num_pages,
                page_size=layout.page_size,
            )
        self.device = SimulatedDevice(layout.seed) if depth > 1 and not self.pipeline else None
        tree = PrefixTree(layout.page_size, least_recently_used) if layout.prefixes else None
        ledger = Ledger(num_pages=num_pages, page_size=layout.page_size, tree=tree)
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_running_requests=layout.max_running,
                max_queued_requests=100,
                chunked_prefill_size=layout.chunk,
                schedule_conservativeness=0.0,
            ),
            ledger,
            context_length=CONTEXT,
            vocab_size=VOCAB,
            eos_token_ids=[EOS],
            clock=ManualClock(),
            grammars=ReadyGrammars(),
            token_feed=TokenFeed.SCHEDULER if self.pipeline else TokenFeed.ROW,
            most_decodes=-(-layout.max_running // layout.stages) if self.pipeline else None,
            speculation=None
            if known is None
            else Speculation(
                None if self._guesses_by_rank(layout) else HalfKnown(known),
                ledger,
                most_drafts=layout.drafts,
                most_step_tokens=24,
                context_length=CONTEXT,
                clock=ManualClock(),
                overlaps=self._guesses_by_rank(layout),
            ),
        )
        self.runner = self._runner(layout, num_pages, known)
        executor: StepExecutor = SerialExecutor(self.runner.execute)
        if self.pipeline:
            self.pipeline.execute = self.runner.execute
            executor = self.pipeline
        elif depth > 1 and self._guesses_by_rank(layout) and layout.seed % 2 == 0:
            executor = self.thread = OverlappedLaunches(self._launch)
        elif depth > 1:
            executor = QueuedExecutor(self._launch)
        self.channel: QueueChannel[EngineInput] = QueueChannel()
        self.loop = EngineLoop(
            self.scheduler,
            executor,
            self.channel,
            CallbackSender(self._take),
            depth=depth,
            clock=ManualClock(),
        )

    def _guesses_by_rank(self, layout: Layout) -> bool:
        return layout.by_rank and self.pipeline is None

    def _runner(
        self,
        layout: Layout,
        num_pages: int,
        known: Mapping[tuple[int, ...], Sequence[int]] | None,
    ) -> Runner:
        rows = RowTable(num_rows=layout.max_running, max_pages=CONTEXT, device=CPU)
        failures: dict[int, str] = {}
        kernels = TorchKernels()
        sampler = Sampler(
            rows,
            [LogitBias(CPU), Penalties(CPU, kernels), MinNewTokens([EOS], CPU), ThinkingBudgets()],
            kernels,
            failures,
            GrammarMasks(
                ReadyGrammars(),
                kernels,
                num_rows=layout.max_running,
                vocab_size=VOCAB,
                failures=failures,
                vocabulary=lambda: pytest.fail("nothing here needs a vocabulary"),
            ),
        )
        more: dict[str, Any] = {}
        if self.device is not None:
            more["download"] = self.device.download
        pages = make_pages(num_pages, layout.page_size)
        if known is not None and self._guesses_by_rank(layout):
            more["drafter"] = HalfKnownOnRank(known, rows, pages[0][0][:, 0, :, 0])
        return Runner(
            self.pipeline.model if self.pipeline else HashingModel(),
            NothingRecorded(),
            kv_caches=pages,
            rows=rows,
            sampler=sampler,
            page_size=layout.page_size,
            device=CPU,
            **more,
        )

    def _launch(self, plan: StepPlan) -> Launched:
        assert self.device is not None
        self.plans.append(plan)
        with self.device.launching():
            return self.runner.launch(plan)

    def _take(self, message: EngineOutput) -> None:
        assert isinstance(message, StepOutputs)
        for output in message.outputs:
            name = output.request_id
            assert name not in self.finishes, "an output after the terminal one"
            self.tokens.setdefault(name, []).extend(output.token_ids)
            found = self.logprobs.setdefault(name, [])
            found += [one for one in (output.prompt_logprobs, output.logprobs) if one is not None]
            if output.finish is not None:
                self.finishes[name] = output.finish

    def run(self, asked: Sequence[Asked], *, with_aborts: bool) -> None:
        for turn in range(3000):
            for index, one in enumerate(asked):
                if one.arrives == turn:
                    self.channel.send(
                        Generate(
                            request_id=str(index),
                            prompt_ids=one.prompt,
                            options=RequestOptions(sampling=one.sampling, logprobs=one.logprobs),
                        )
                    )
                if with_aborts and one.aborted == turn:
                    self.channel.send(Abort(str(index)))
            self.loop.turn(0.0)
            if len(self.finishes) == len(asked):
                break
        assert len(self.finishes) == len(asked), "a request never ended"
        for _ in range(4):
            self.loop.turn(0.0)
        assert self.scheduler.status().num_leased_pages == 0
        if self.thread is not None:
            self.thread.close()
        if self.device is not None:
            self.device.close()


@settings(max_examples=examples(500))
@given(st.lists(requests(), min_size=1, max_size=7), LAYOUTS)
def test_overlapping_steps_and_drafts_put_out_the_same(asked: list[Asked], layout: Layout) -> None:
    one_by_one = World(layout, depth=1)
    one_by_one.run(asked, with_aborts=False)
    known = {tuple(one.prompt): one_by_one.tokens[str(at)] for at, one in enumerate(asked)}
    overlapping = World(layout, depth=layout.depth, known=known if layout.drafts else None)
    overlapping.run(asked, with_aborts=True)
    for index, one in enumerate(asked):
        name = str(index)
        expected, got = one_by_one.tokens[name], overlapping.tokens[name]
        logprobs, told = (
            TokenLogprobs.joined(world.logprobs[name]) for world in (one_by_one, overlapping)
        )
        if overlapping.finishes[name].kind == "abort":
            assert one.aborted is not None
            assert got == expected[: len(got)]
            assert told == logprobs[: len(told)]
        elif one_by_one.finishes[name].kind == "error" and got != expected:
            # A token in flight at a retraction is told before the grammar gets to refuse it.
            assert overlapping.finishes[name].kind == "error"
            assert got[: len(expected)] == expected
            assert len(got) - len(expected) < layout.depth
        else:
            assert got == expected
            assert told == logprobs
            assert overlapping.finishes[name] == one_by_one.finishes[name]


def plain(index: int, **sampling: Any) -> Asked:
    ignore_eos = "grammar" not in sampling
    params = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=ignore_eos, **sampling)
    return Asked([index, 3, 9], params, LogprobOptions(num_top=1), arrives=index, aborted=None)


LAYOUT = Layout(page_size=2, num_tokens=90, chunk=-1, max_running=4, prefixes=True, depth=2, seed=0)


def test_a_launch_waits_for_nothing() -> None:
    """Log probabilities, random sampling and biases included."""
    world = World(LAYOUT, depth=2)
    world.run([plain(0), plain(1, logit_bias={3: 1.0}), plain(2)], with_aborts=False)
    assert world.device is not None
    assert world.device.waits_in_launch == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_steps_with_guesses_of_the_rank_overlap(seed: int) -> None:
    """Also of requests with penalties and grammars: each is planned again in every step."""
    asked = [plain(0), plain(1, presence_penalty=1.0), plain(2, grammar=GRAMMARS[1])]
    one_by_one = World(LAYOUT, depth=1)
    one_by_one.run(asked, with_aborts=False)
    known = {tuple(one.prompt): one_by_one.tokens[str(at)] for at, one in enumerate(asked)}
    world = World(replace(LAYOUT, drafts=2, by_rank=True, seed=seed), depth=2, known=known)
    world.run(asked, with_aborts=False)
    assert world.tokens == one_by_one.tokens
    total = world.scheduler.status().speculated
    assert total is not None
    assert 0 < total.num_accepted < total.num_drafted
    decodes = [entry for plan in world.plans for entry in plan.scheduled if entry.num_output]
    following = [entry for entry in decodes if entry.follows]
    assert len(following) >= len(decodes) - 2 * len(asked)
    assert {len(entry.draft_ids) for entry in following} >= {0, 2}


@pytest.mark.parametrize(
    "sampling", [{"grammar": GRAMMARS[1]}, {"presence_penalty": 1.0}, {"thinking_budget": THINKING}]
)
def test_only_what_depends_on_the_token_before_waits_for_it(sampling: dict[str, Any]) -> None:
    world = World(LAYOUT, depth=2)
    world.run([plain(0, **sampling), plain(1)], with_aborts=False)
    assert world.device is not None
    # The first token of a request follows none; each later one waits for the one before.
    assert world.device.waits_in_launch == len(world.tokens["0"]) - 1
