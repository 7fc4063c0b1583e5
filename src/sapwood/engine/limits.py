"""The limits of this engine and its model on a single request."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.schema.pooling import Pooling, why_not
from sapwood.schema.request import FLOAT32_BYTES, Generate


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBounds:
    """The limits on a request.

    context_length     prompt and output tokens at most
    pool_tokens        tokens that the KV pool holds
    vocab_size         token ids that the model knows
    max_prompt_tokens  prompt tokens at most; None: as many as the context holds
    pooling            how the model makes embeddings or scores; None: the model generates
    hidden_size        length of a token's embedding
    """

    context_length: int
    pool_tokens: int
    vocab_size: int
    max_prompt_tokens: int | None
    pooling: Pooling | None
    hidden_size: int = 0

    @property
    def max_tokens(self) -> int:
        """Prompt and output tokens of one request at most."""
        return min(self.context_length, self.pool_tokens)

    def why_refused(self, request: Generate) -> str | None:
        """Why the engine cannot serve the request; None if it can."""
        numbers = "embed" if self.pooling is None else self.pooling.task
        unable = why_not(self.pooling, "tokens" if request.options.embed is None else numbers)
        if unable is not None:
            return unable
        num_tokens = len(request.prompt_ids)
        unfit = self._unfit_embeds(request) if request.input_embeds else None
        if unfit is not None:
            return unfit
        if num_tokens == 0:
            return "the prompt is empty; send at least one token"
        longest = self.max_prompt_tokens
        if longest is not None and num_tokens > longest:
            return (
                f"the prompt has {num_tokens} tokens but this server accepts at most {longest}, "
                f"its --max-prompt-tokens; shorten it by {num_tokens - longest}"
            )
        room_for_output = 1 if request.options.embed is None else 0
        limit = self.max_tokens - room_for_output
        if num_tokens > limit:
            return (
                f"the prompt has {num_tokens} tokens but this engine accepts at most {limit} "
                f"(context length {self.context_length}, KV pool {self.pool_tokens}); "
                f"shorten it by {num_tokens - limit}"
            )
        return self._why_outside_vocabulary(request)

    def _unfit_embeds(self, request: Generate) -> str | None:
        if request.options.embed is not None:
            return "input_embeds are only for models that generate; send text or token ids"
        if request.options.prompt_scores_start is not None:
            return "a prompt of input_embeds has no tokens whose log probabilities could be told"
        sizes = {len(vector) for vector in request.input_embeds}
        if sizes != {FLOAT32_BYTES * self.hidden_size}:
            return f"input_embeds must be vectors of {self.hidden_size} numbers each"
        if len(request.input_embeds) != len(request.prompt_ids):
            return "input_embeds must have a vector for each token of the prompt"
        return None

    def _why_outside_vocabulary(self, request: Generate) -> str | None:
        """A tokenizer may know more tokens than its model; such an id must not reach a kernel."""
        logprobs = request.options.logprobs
        scored = () if logprobs is None else logprobs.token_ids
        fields = [("prompt", request.prompt_ids), ("logprobs", scored)]
        for name, ids in (*fields, *request.options.sampling.token_ids()):
            if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
                outside = next(token_id for token_id in ids if not 0 <= token_id < self.vocab_size)
                return (
                    f"{name} has the token id {outside}, which is outside the model's vocabulary, "
                    f"0 to {self.vocab_size - 1}; take ids of this model's tokenizer"
                )
        return None
