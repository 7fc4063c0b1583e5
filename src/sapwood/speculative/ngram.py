"""Guesses copied from text: what followed the last tokens when they came before.

Text is the prompts and outputs of all requests of a namespace, the request's own among them. The
places where the last tokens came before, and what follows each of them, form a trie; its likely
part becomes a tree of guesses.

Source: prompt lookup decoding, as in Hugging Face transformers (`prompt_lookup_num_tokens`); the
trie over all requests and the names of its options are SGLang's. It needs no draft model, and pays
where an output repeats text: in edits, summaries and code.
"""

from __future__ import annotations

import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

from sapwood.speculative.interface import NO_GUESSES, Guesses
from sapwood.speculative.text_index import LONG_END, Text, TextIndex, common_end

MOST_LOOKED_AT = 16
"""Places with the same end that are looked at: a prompt may be one token, again and again."""
MOST_SHORT_LOOKED_AT = 4
"""The same where only the last token or two are alike."""
MOST_MATCHES = 4
"""Places whose continuations become a tree."""
SIDE_STEP = 3
"""A guess of a side branch comes after the guesses so many places further on the main branch."""
MATCH_CLASSES = 12
"""Matches of this length and longer are right equally often."""
SIDE_CLASSES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramRules:
    """What counts as a match, and how much of what follows is guessed.

    least_match, most_match  tokens that must repeat; tokens that are compared
    least_breadth, most_breadth  guesses in one place: after the longest match, and the shortest
    branch_length  tokens of a branch
    by_frequency  of several tokens that followed, the most frequent first; else the latest first
    """

    least_match: int = 1
    most_match: int = 12
    least_breadth: int = 1
    most_breadth: int = 10
    branch_length: int = 18
    by_frequency: bool = False

    @property
    def is_chain(self) -> bool:
        return self.most_breadth == 1

    def breadth(self, match: int) -> int:
        """Of the tree's first place, after a match of that length."""
        spread = (self.most_breadth - self.least_breadth) / max(
            self.most_match - self.least_match, 1
        )
        return round(self.most_breadth - spread * (min(match, self.most_match) - self.least_match))


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
        """A tree of up to `most` tokens, the likeliest first: a guess has a kind by the length of
        the match before it, by how many matches agree with it, and by how far its branch is from
        the main one."""
        if most <= 0 or not self._index.knows(self._text):
            return NO_GUESSES
        matches, length = self._matches()
        if not matches:
            return NO_GUESSES
        rules = self._drafter.rules
        longest = min(most, rules.branch_length)
        branches = [self._following(*match, longest) for match in matches]
        if len(branches) == 1 or (rules.is_chain and not rules.by_frequency):
            return _chain(branches, length)
        return _tree(branches, rules, length, most)

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


def _chain(branches: list[array[int]], match: int) -> Guesses:
    """The first branch; the others only tell how many agree with it."""
    kinds: list[int] = []
    first = branches[0].tolist()
    for depth, token_id in enumerate(first):
        agreeing = branches
        if len(branches) > 1:
            agreeing = [
                other for other in branches if depth < len(other) and other[depth] == token_id
            ]
        kinds.append(_kind(match + depth, len(agreeing), len(branches), 0))
        branches = agreeing
    return Guesses(token_ids=first, kinds=kinds)


def _tree(branches: list[array[int]], rules: NgramRules, match: int, most: int) -> Guesses:
    """branches  what followed each match"""
    token_ids: list[int] = []
    kinds: list[int] = []
    parents: list[int] = []
    order = count()
    waiting: list[_Next] = []

    def go_on(late: int, parent: int, depth: int, sides: int, going: list[array[int]]) -> None:
        """Let what may follow a guess wait for its turn."""
        children: dict[int, list[array[int]]] = {}
        for branch in going:
            if depth < len(branch):
                children.setdefault(branch[depth], []).append(branch)
        ranked = list(children.items())
        if len(ranked) > 1:
            if rules.by_frequency:
                ranked.sort(key=lambda child: -len(child[1]))
            del ranked[max(rules.breadth(match + depth), 1) :]
        for rank, (token_id, agreeing) in enumerate(ranked):
            kind = _kind(match + depth, len(agreeing), len(going), sides + rank)
            turn = late + 1 + SIDE_STEP * rank
            heapq.heappush(
                waiting, (turn, next(order), parent, depth, sides + rank, kind, token_id, agreeing)
            )

    go_on(0, -1, 0, 0, branches)
    while waiting and len(token_ids) < most:
        late, _, parent, depth, sides, kind, token_id, agreeing = heapq.heappop(waiting)
        token_ids.append(token_id)
        kinds.append(kind)
        parents.append(parent)
        go_on(late, len(token_ids) - 1, depth + 1, sides, agreeing)
    is_chain = parents == list(range(-1, len(parents) - 1))
    return Guesses(token_ids=token_ids, kinds=kinds, parents=() if is_chain else parents)


_Next: TypeAlias = "tuple[int, int, int, int, int, int, int, list[array[int]]]"
"""(turn, order, parent, depth, steps to the side, kind, token, branches): a guess that waits."""


def _kind(match: int, num_agreeing: int, num_branches: int, sides: int) -> int:
    agreement = 0 if num_branches == 1 else 1 + (num_agreeing == num_branches)
    side = min(sides, SIDE_CLASSES - 1)
    return (min(match, MATCH_CLASSES) * 3 + agreement) * SIDE_CLASSES + side
