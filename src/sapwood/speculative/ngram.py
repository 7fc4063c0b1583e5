"""Guesses copied from text: what followed the last tokens when they came before.

Text is the prompts and outputs of all requests of a namespace, the request's own among them. The
places where the last tokens came before, and what follows each of them, are a trie, of which the
likeliest branch is guessed.

Source: prompt lookup decoding, as in Hugging Face transformers (`prompt_lookup_num_tokens`); the
trie over all requests and the names of its options are SGLang's. It needs no draft model, and pays
where an output repeats text: in edits, summaries and code.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from sapwood.speculative.interface import NO_GUESSES, Guesses
from sapwood.speculative.text_index import LONG_END, Text, TextIndex, common_end

MOST_LOOKED_AT = 16
"""Places with the same end that are looked at: a prompt may be one token, again and again."""
MOST_SHORT_LOOKED_AT = 4
"""The same where only the last token or two are alike."""
MOST_MATCHES = 4
"""Places whose continuations are compared."""
MATCH_CLASSES = 12
"""Matches of this length and longer are right equally often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramRules:
    """What counts as a match, and how much of what follows is guessed.

    least_match, most_match  tokens that must repeat; tokens that are compared
    branch_length  tokens that are guessed in a row
    by_frequency  of several tokens that followed, the most frequent first; else the latest first
    """

    least_match: int = 1
    most_match: int = 12
    branch_length: int = 31
    by_frequency: bool = False


class NgramDrafter:
    """Guesses for all requests of an engine, out of an index per namespace."""

    def __init__(self, rules: NgramRules, *, capacity: int) -> None:
        """capacity  tokens of text that are kept, of all namespaces together"""
        self.rules = rules
        self._capacity = capacity
        self._indexes: OrderedDict[str, TextIndex] = OrderedDict()
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that are kept."""
        return self._num_tokens

    @property
    def num_namespaces(self) -> int:
        return len(self._indexes)

    def begin(self, namespace: str, prompt_ids: Sequence[int]) -> NgramDraft:
        index = self._indexes.setdefault(namespace, TextIndex())
        self._indexes.move_to_end(namespace)
        draft = NgramDraft(self, index, index.begin())
        draft.extend(prompt_ids)
        return draft

    def make_room(self, num_tokens: int) -> None:
        """Count so many tokens more, and forget the oldest texts of the namespace that began no
        text for longest while there are too many."""
        self._num_tokens += num_tokens
        while self._num_tokens > self._capacity:
            namespace, index = next(iter(self._indexes.items()))
            self._num_tokens -= index.drop_oldest()
            if not len(index):
                del self._indexes[namespace]


class NgramDraft:
    """The text of one request, in its namespace's index."""

    def __init__(self, drafter: NgramDrafter, index: TextIndex, text: Text) -> None:
        self._drafter = drafter
        self._index = index
        self._text = text

    def extend(self, token_ids: Sequence[int]) -> None:
        # A text that was forgotten while its request runs stays so.
        if self._index.knows(self._text):
            for token_id in token_ids:
                self._index.extend(self._text, token_id)
            self._drafter.make_room(len(token_ids))

    def propose(self, most: int) -> Guesses:
        """Up to `most` tokens. A guess has a kind by the length of the match before it, and by how
        many of several matches agree with it."""
        if most <= 0 or not self._index.knows(self._text):
            return NO_GUESSES
        matches, length = self._matches()
        if not matches:
            return NO_GUESSES
        rules = self._drafter.rules
        longest = min(most, rules.branch_length)
        branches = [self._following(*match, longest) for match in matches]
        return _chain(branches, length, by_frequency=rules.by_frequency)

    def close(self) -> None:
        """The text stays for other requests."""

    def _matches(self) -> tuple[list[tuple[Text, int]], int]:
        """(the latest places that end with the longest match and go on, the match's length)"""
        rules, text = self._drafter.rules, self._text
        for is_long, most_looked_at in ((True, MOST_LOOKED_AT), (False, MOST_SHORT_LOOKED_AT)):
            if is_long and rules.most_match < LONG_END:
                continue
            longest, found = rules.least_match, list[tuple[Text, int]]()
            for number, (other, index) in enumerate(self._index.ending_like(text, is_long=is_long)):
                if number == most_looked_at:
                    break
                if index + 1 == len(other.tokens):
                    continue
                length = common_end(text, other, index, rules.most_match)
                if length > longest:
                    longest, found = length, [(other, index)]
                elif length == longest and len(found) < MOST_MATCHES:
                    found.append((other, index))
                elif length == rules.most_match:
                    break
            if found:
                return found, longest
        return [], 0

    def _following(self, other: Text, index: int, most: int) -> array[int]:
        """What followed a match; if that reaches the text's own end, the text between the two
        repeats itself."""
        follows = other.tokens[index + 1 : index + 1 + most]
        if other is self._text and len(follows) < most:
            follows *= -(-most // len(follows))
        return follows[:most]


def _chain(branches: list[array[int]], match: int, *, by_frequency: bool) -> Guesses:
    """The likeliest branch, as far as one goes.

    branches  what followed each match, the latest first
    """
    token_ids: list[int] = []
    kinds: list[int] = []
    while len(branches) > 1:
        going = [branch for branch in branches if len(token_ids) < len(branch)]
        if not going:
            break
        depth = len(token_ids)
        following = [branch[depth] for branch in going]
        token_id = Counter(following).most_common(1)[0][0] if by_frequency else following[0]
        branches = [branch for branch in going if branch[depth] == token_id]
        token_ids.append(token_id)
        kinds.append(_kind(match + depth, len(branches), len(going)))
    if len(branches) == 1:
        rest = branches[0][len(token_ids) :].tolist()
        kinds += [_kind(match + len(token_ids) + more, 1, 1) for more in range(len(rest))]
        token_ids += rest
    return Guesses(token_ids=token_ids, kinds=kinds)


def _kind(match: int, num_agreeing: int, num_going: int) -> int:
    """By the length of the match and by how many of several matches agree."""
    agreement = 0 if num_going == 1 else 1 + (num_agreeing == num_going)
    return min(match, MATCH_CLASSES) * 3 + agreement
