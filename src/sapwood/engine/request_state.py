"""One request inside the engine."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from enum import Enum, auto

from sapwood.engine.per_token import PerToken
from sapwood.memory.lease import Lease
from sapwood.memory.namespace import MEDIUM, Branch, Namespace, base_of, place_at
from sapwood.memory.node import TOKEN_BYTES
from sapwood.memory.prefix_tree import token_key
from sapwood.schema.logprobs import TokenLogprobs
from sapwood.schema.output import Finish, Speculated
from sapwood.schema.request import Generate
from sapwood.schema.step import RowStart, ScheduledTokens


class Phase(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


_NEXT = {
    Phase.WAITING: {Phase.RUNNING, Phase.FINISHED},
    Phase.RUNNING: {Phase.WAITING, Phase.FINISHED},
    Phase.FINISHED: set(),
}


def adapter_in(namespace: str, *, has_lengths: bool) -> str:
    """The adapter of the requests with that `text_namespace`; "": the base model's.

    has_lengths  whether keys of short and of long texts differ, so that names say which they are
    """
    adapter, zero, _ = namespace.partition("\0")
    if not zero:
        return ""
    return adapter.partition(" ")[2] if has_lengths else adapter


class RequestState:
    """A request has computed `num_computed_tokens` and wants to reach `num_tokens`.

    Both count what steps in flight will have done: a sampled token whose id is not yet known is one
    of `num_pending_outputs`. Of a step with drafts they count one token, as if all drafts were
    wrong, until its result says how many were right: the lease may have pages for more tokens.
    Steps in flight that have drafts, or after which a rank guesses, are `unsettled`.
    """

    def __init__(
        self,
        request: Generate,
        *,
        max_new_tokens: int,
        seed: int,
        arrival: int,
        arrival_s: float,
        switch_length: int | None = None,
        adapter_start: int | None = 0,
    ) -> None:
        """The state of a request that has just come.

        switch_length  as RopeConfig.switch_length
        adapter_start  the first token that has the request's adapter; None: no token has
        """
        self.request_id = request.request_id
        self.prompt_ids = request.prompt_ids
        self.options = request.options
        self.stop_token_ids = frozenset(request.options.sampling.stop_token_ids)
        self.priority = request.options.priority or 0
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.arrival = arrival
        self.arrival_s = arrival_s
        self.queue_time_s = 0.0
        self.phase = Phase.WAITING
        self.finish: Finish | None = None
        self.output_ids: list[int] = []
        self.num_pending_outputs = 0
        self.num_computed_tokens = 0
        self.unsettled: list[ScheduledTokens] = []
        self.speculated: Speculated | None = None
        self.num_cached_tokens: int | None = None
        self.tier_tokens = 0, 0  # of these, from the host and from the storage
        self.lease: Lease | None = None
        self.row = -1
        self.adapter = "" if adapter_start is None else request.options.adapter
        self.adapter_start = adapter_start or 0
        self.adapter_slot = -1
        self.num_runs = 0
        self.last_step = -1
        self.pauses_until_s = 0.0
        self._switch_length = switch_length
        self._runs_as_short = switch_length is not None
        self.input_embeds = request.input_embeds
        self.media = request.media
        self.hidden_states = PerToken() if request.options.return_hidden_states else None
        self.routed_experts = PerToken() if request.options.return_routed_experts else None
        self.uses_prefixes = self.shares_prefixes
        self.most_matchable: int | None = None
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._num_scored = 0
        self._key = token_key(request.prompt_ids)
        self._page_hashes: list[int] | None = None
        self._hashed_namespace: Namespace = ""

    @property
    def text_namespace(self) -> str:
        """The name of the requests whose prefixes it may reuse from the first token on: the keys of
        short and of long texts are rotated differently."""
        adapter, key = self.adapter, self.options.namespace
        if (adapter and not self.adapter_start) or "\0" in key:  # no adapter's name has a zero
            key = f"{adapter}\0{key}"
        if self._switch_length is None:
            return key
        return f"{'short' if self._is_short else 'long'} {key}"

    @property
    def namespace(self) -> Namespace:
        """The prefix tree's name of the requests whose prefixes it may reuse: up to the token where
        its adapter begins, those of the base model; from each picture on, those that show it."""
        found: Namespace = self.text_namespace
        if self.adapter_start:
            found = Branch(base=found, first_token=self.adapter_start, name=self.adapter)
        for medium in self.media:
            name = MEDIUM + medium.digest.hex()
            found = Branch(base=found, first_token=medium.spans[0][0], name=name)
        return found

    @property
    def _is_short(self) -> bool:
        return self._switch_length is not None and self.num_tokens <= self._switch_length

    @property
    def has_outgrown(self) -> bool:
        """Whether a running request's text has become a long one, whose keys must be computed
        anew."""
        return self._runs_as_short and not self._is_short

    @property
    def most_drafts(self) -> int:
        """Tokens that may be guessed without making a short text a long one."""
        if self._switch_length is None or not self._runs_as_short:
            return self.max_new_tokens
        return max(0, self._switch_length - self.num_tokens)

    def begin_run(self, row: int) -> None:
        """Take a row; from now on the text is rotated as one of its length."""
        self.row = row
        self.num_runs += 1
        self._runs_as_short = self._is_short

    @property
    def shares_prefixes(self) -> bool:
        """Whether other requests may reuse its prefixes: only token ids identify a prefix."""
        return not self.input_embeds

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_known_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_outputs(self) -> int:
        """Number of output tokens, pending ones included."""
        return len(self.output_ids) + self.num_pending_outputs

    @property
    def num_uncertain(self) -> int:
        """How many tokens more than `num_computed_tokens` it may have once its steps in flight are
        done: their drafts."""
        return sum(len(entry.draft_ids) for entry in self.unsettled)

    @property
    def num_outstanding(self) -> int:
        """Number of output tokens that the request may still produce."""
        return self.max_new_tokens - self.num_outputs

    @property
    def num_tokens(self) -> int:
        return self.num_known_tokens + self.num_pending_outputs

    @property
    def num_missing_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_exhausted(self) -> bool:
        """Whether all output tokens are known or pending, so that nothing is left to compute."""
        return self.num_outputs >= self.max_new_tokens and (
            self.max_new_tokens > 0 or self.num_missing_tokens == 0
        )

    @property
    def ends_with_prompt(self) -> bool:
        """Whether the request ends with its prompt, and wants no output tokens and no embedding."""
        return self.max_new_tokens == 0 and self.options.embed is None

    def finish_after(self, token_id: int, eos_token_ids: AbstractSet[int]) -> Finish | None:
        """How the newest output token ends the request; None if the request goes on."""
        sampling = self.options.sampling
        may_stop = len(self.output_ids) > sampling.min_new_tokens
        is_eos = token_id in eos_token_ids and not sampling.ignore_eos
        # With a grammar, an end of sequence before min_new_tokens was the only token allowed.
        may_stop = may_stop or (is_eos and sampling.grammar is not None)
        if may_stop and (is_eos or token_id in self.stop_token_ids):
            return Finish(kind="stop", matched=token_id)
        if len(self.output_ids) >= self.max_new_tokens:
            return Finish(kind="length")
        return None

    def move_to(self, phase: Phase) -> None:
        if phase not in _NEXT[self.phase]:
            raise RuntimeError(f"{self.request_id}: {self.phase} -> {phase}")
        self.phase = phase

    def key(self, num_tokens: int | None = None) -> bytes:
        """The prefix tree's key of the first `num_tokens` known tokens; None: of all."""
        known = self._key + token_key(self.output_ids) if self.output_ids else self._key
        return known if num_tokens is None else known[: num_tokens * TOKEN_BYTES]

    def new_token_ids(self, num_new: int) -> list[int]:
        """Ids of the next `num_new` tokens to compute; empty if that is a single pending token."""
        start = self.num_computed_tokens
        if start >= self.num_known_tokens:
            return []
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : start - num_prompt + num_new]
        ids = self.prompt_ids[start : start + num_new]
        return ids + self.output_ids[: num_new - len(ids)] if len(ids) < num_new else ids

    def row_start(self) -> RowStart:
        """The message that tells a rank about the request when it takes its row."""
        return RowStart(
            row=self.row,
            options=self.options,
            seed=self.seed,
            prompt_ids=[] if self.input_embeds else self.prompt_ids,
            output_ids=list(self.output_ids),
            input_embeds=self.input_embeds,
            media=[medium.without_pixels for medium in self.media],
            num_prompt=len(self.prompt_ids) if self.media else 0,
            first_position=0 if self._runs_as_short else self._switch_length or 0,
            adapter_slot=self.adapter_slot,
            adapter_start=self.adapter_start,
        )

    # ---- tokens that must be computed though their KV is known -----------------------------------

    @property
    def next_scored(self) -> int | None:
        """The first prompt token whose logits are still wanted; None: no logits are."""
        start = self.options.prompt_scores_start
        if start is None:
            return None
        position = start + self._num_scored
        return position if position < len(self.prompt_ids) - 1 else None

    @property
    def first_needed(self) -> int | None:
        """The first token that the request must compute itself; None: there is no such token.

        A prefix hit brings a token's KV, but neither its logits, nor its hidden state or experts.
        """
        told = (self.hidden_states, self.routed_experts)
        needed = [one.num_known for one in told if one is not None]
        if self.next_scored is not None:
            needed.append(self.next_scored)
        return min(needed, default=None)

    @property
    def num_matchable_tokens(self) -> int:
        """Tokens that a prefix hit may cover at most: all before `first_needed`, and up to
        `most_matchable`, but never the last known token."""
        if not self.uses_prefixes:
            return 0
        all_but_last = self.num_known_tokens - 1
        limits = [self.first_needed, self.most_matchable]
        return min([all_but_last, *(limit for limit in limits if limit is not None)])

    def matchable_key(self) -> bytes:
        """The prefix tree's key of the tokens that a prefix hit may cover, and of one more."""
        return self.key(self.num_matchable_tokens + 1)

    def scored_among(self, num_new: int) -> tuple[int, int]:
        """(first, number) of those among the next `num_new` tokens whose logits are wanted."""
        start = self.next_scored
        if start is None:
            return 0, 0
        first = max(self.num_computed_tokens, start)
        end = min(self.num_computed_tokens + num_new, len(self.prompt_ids) - 1)
        return first, max(end - first, 0)

    def num_told_among(self, told: PerToken | None, num_new: int) -> int:
        """How many of the next `num_new` tokens, counted from the end, are to be told of."""
        return 0 if told is None else told.num_wanted(self.num_computed_tokens, num_new)

    def take_prompt_logprobs(self, first: int, logprobs: TokenLogprobs) -> None:
        """Take the log probabilities of the prompt tokens from `first` on.

        After a retraction in the middle of a prompt, a step in flight may bring log probabilities
        that are computed once more later.
        """
        start = self.next_scored
        new = logprobs if start is None or start == first else logprobs[start - first :]
        if start is not None and new:
            self._prompt_logprobs.append(new)
            self._num_scored += len(new)

    def prompt_logprobs_to_tell(self) -> TokenLogprobs | None:
        """All of the prompt's log probabilities, once they are complete; None before and after."""
        if not self._prompt_logprobs or self.next_scored is not None:
            return None
        parts, self._prompt_logprobs = self._prompt_logprobs, []
        return TokenLogprobs.joined(parts)

    def page_hashes(self, page_size: int) -> list[int]:
        """Hashes: entry i identifies the prompt's first i + 1 whole pages, and the namespace."""
        namespace = self.namespace
        if self._page_hashes is None or self._hashed_namespace != namespace:
            size = page_size * TOKEN_BYTES
            state = hash(base_of(namespace))
            self._hashed_namespace = namespace
            self._page_hashes = []
            for start in range(0, len(self._key) - size + 1, size):
                state = hash((state, place_at(namespace, self._key, start, size)))
                self._page_hashes.append(state)
        return self._page_hashes
