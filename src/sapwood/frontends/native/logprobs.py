"""Log probabilities in the fields of SGLang's own dialect."""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.serving.encoded_lists import EncodedList, in_pieces
from sapwood.frontends.serving.sampling import renamed
from sapwood.schema.logprobs import LogprobOptions, TokenLogprobs
from sapwood.text.generation import ScoredPrompt
from sapwood.text.token_names import TokenNames

Entry = tuple[float | None, int, str | None]
"""(log probability, token id, text)"""


def logprob_options(
    wanted: bool, start: int, num_top: int, token_ids: Sequence[int]
) -> LogprobOptions | None:
    """The log probabilities that one prompt's fields ask for.

    start  prompt token after which they are wanted; -1: for no prompt token
    """
    if not wanted:
        for name, given in (
            ("logprob_start_len", start != -1),
            ("top_logprobs_num", num_top != 0),
            ("token_ids_logprob", bool(token_ids)),
        ):
            if given:
                raise InvalidRequest(f"{name} is only for return_logprob=true", param=name)
        return None
    if start < -1:
        raise InvalidRequest(
            f"logprob_start_len is {start} but must be -1 or an index into the prompt",
            param="logprob_start_len",
        )
    try:
        return LogprobOptions(
            prompt_start=None if start == -1 else start,
            num_top=num_top,
            token_ids=tuple(token_ids),
        )
    except InvalidRequest as error:
        names = {"num_top": "top_logprobs_num", "token_ids": "token_ids_logprob"}
        raise renamed(error, names) from None


class LogprobLists:
    """The lists of log probabilities in one sample's meta_info, which grow with its output.

    names  names of the tokens; None: tokens are listed without their texts
    """

    def __init__(self, options: LogprobOptions, names: TokenNames | None) -> None:
        self._options = options
        self._names = names
        self._input = _Lists()
        self._output = _Lists()

    async def add_prompt(self, prompt: ScoredPrompt) -> None:
        """The first token has no log probability: what comes before it is not told."""
        first, *others = prompt.token_ids
        self._input.tokens.extend([self._entry(None, first)])
        self._input.top.extend([None])
        self._input.chosen.extend([None])
        if prompt.logprobs is not None:
            await self._add(self._input, others, prompt.logprobs)

    async def add_output(self, token_ids: Sequence[int], values: TokenLogprobs) -> None:
        await self._add(self._output, token_ids, values)

    def fields(self) -> dict[str, object]:
        given: dict[str, object] = {
            "input_token_logprobs": self._input.tokens.json,
            "output_token_logprobs": self._output.tokens.json,
        }
        if self._options.num_top:
            given["input_top_logprobs"] = self._input.top.json
            given["output_top_logprobs"] = self._output.top.json
        if self._options.token_ids:
            given["input_token_ids_logprobs"] = self._input.chosen.json
            given["output_token_ids_logprobs"] = self._output.chosen.json
        return given

    async def _add(self, lists: _Lists, token_ids: Sequence[int], values: TokenLogprobs) -> None:
        entry, asked = self._entry, self._options.token_ids
        async for _, ids, part in in_pieces(token_ids, values, self._options.num_per_token):
            lists.tokens.extend(list(map(entry, part.of_tokens(), ids)))
            if self._options.num_top:
                lists.top.extend(
                    [[entry(*token) for token in likely] for likely in part.of_likeliest()]
                )
            if asked:
                lists.chosen.extend([list(map(entry, row, asked)) for row in part.of_chosen()])

    def _entry(self, logprob: float | None, token_id: int) -> Entry:
        return logprob, token_id, None if self._names is None else self._names.text(token_id)


class _Lists:
    """The lists for the prompt's tokens, or for the output's."""

    def __init__(self) -> None:
        self.tokens = EncodedList()
        self.top = EncodedList()
        self.chosen = EncodedList()
