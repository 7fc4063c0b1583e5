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
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from sapwood.speculative.interface import NO_GUESSES, Guesses
from sapwood.speculative.text_index import ENDS, NOWHERE, TextIndex

MOST_LOOKED_AT = 64
"""Places with the same end that are looked at: a prompt may be one token, again and again."""
MOST_MATCHES = 8
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

    def breadth(self, match: int) -> int:
        """Of the tree's first place, after a match of that length."""
        spread = (self.most_breadth - self.least_breadth) / max(
            self.most_match - self.least_match, 1
        )
        return round(self.most_breadth - spread * (min(match, self.most_match) - self.least_match))


class NgramDraft:
    """The text of one request as a part of the index."""

    def __init__(
        self, index: TextIndex, rules: NgramRules, namespace: str, prompt_ids: Sequence[int]
    ) -> None:
        self._index = index
        self._rules = rules
        self._namespace = namespace
        self._end = NOWHERE
        self.extend(prompt_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            self._end = self._index.append(self._namespace, self._end, token_id)

    def propose(self, most: int) -> Guesses:
        """A tree of up to `most` tokens, the likeliest first: a guess has a kind by the length of
        the match before it, by how many matches agree with it, and by how far its branch is from
        the main one."""
        if most <= 0 or not self._index.knows(self._end):
            return NO_GUESSES
        matches, length = self._matches()
        if not matches:
            return NO_GUESSES
        return self._tree(matches, length, most)

    def close(self) -> None:
        """The text stays for other requests."""

    def _matches(self) -> tuple[list[int], int]:
        """(the latest places that end with the longest match and go on, the match's length)"""
        index, rules = self._index, self._rules
        for end in ENDS:
            if end > max(rules.most_match, 1):
                continue
            longest, found = max(rules.least_match, 1), list[int]()
            num_looked_at = 0
            for place in index.ending_like(self._end, end):
                num_looked_at += 1
                if num_looked_at > MOST_LOOKED_AT:
                    break
                if index.following(place) == NOWHERE:
                    continue
                length = index.common_end(self._end, place, rules.most_match)
                if length > longest:
                    longest, found = length, [place]
                elif length == longest:
                    found.append(place)
                    if longest == rules.most_match and len(found) == MOST_MATCHES:
                        break
            if found:
                return found[:MOST_MATCHES], longest
        return [], 0

    def _tree(self, matches: list[int], match: int, most: int) -> Guesses:
        rules = self._rules
        token_ids: list[int] = []
        kinds: list[int] = []
        parents: list[int] = []
        order = count()
        waiting: list[_Next] = []

        def go_on(late: int, parent: int, depth: int, sides: int, places: list[_Walk]) -> None:
            """Let what may follow a guess wait for its turn."""
            if depth == rules.branch_length:
                return
            breadth = max(rules.breadth(match + depth), 1)
            for rank, (token_id, agreeing) in enumerate(self._children(places)[:breadth]):
                kind = _kind(match + depth, len(agreeing), len(places), sides + rank)
                turn = late + 1 + SIDE_STEP * rank
                heapq.heappush(
                    waiting,
                    (turn, next(order), parent, depth, sides + rank, kind, token_id, agreeing),
                )

        go_on(0, -1, 0, 0, [(place, place) for place in matches])
        while waiting and len(token_ids) < most:
            late, _, parent, depth, sides, kind, token_id, agreeing = heapq.heappop(waiting)
            token_ids.append(token_id)
            kinds.append(kind)
            parents.append(parent)
            go_on(late, len(token_ids) - 1, depth + 1, sides, agreeing)
        is_chain = parents == list(range(-1, len(parents) - 1))
        return Guesses(token_ids=token_ids, kinds=kinds, parents=() if is_chain else parents)

    def _children(self, places: list[_Walk]) -> list[tuple[int, list[_Walk]]]:
        """(token, where the walks are that go on with this token), the likeliest first."""
        index = self._index
        found: dict[int, list[_Walk]] = {}
        for place, match in places:
            following = index.following(place)
            if following == NOWHERE and place == self._end:
                # The text between the match and the text's end repeats itself.
                following = index.following(match)
            if following != NOWHERE:
                found.setdefault(index.token_at(following), []).append((following, match))
        children = list(found.items())
        if self._rules.by_frequency:
            children.sort(key=lambda child: -len(child[1]))
        return children


_Walk = tuple[int, int]
"""(where a walk is, the match that it began at)"""
_Next = tuple[int, int, int, int, int, int, int, list[_Walk]]
"""(turn, order, parent, depth, steps to the side, kind, token, walks): a guess that waits."""


def _kind(match: int, num_agreeing: int, num_places: int, sides: int) -> int:
    agreement = 0 if num_places == 1 else 1 + (num_agreeing == num_places)
    side = min(sides, SIDE_CLASSES - 1)
    return (min(match, MATCH_CLASSES) * 3 + agreement) * SIDE_CLASSES + side


class NgramDrafter:
    """Guesses for all requests of an engine, out of one index."""

    def __init__(self, rules: NgramRules, *, capacity: int) -> None:
        """capacity  tokens of text that are kept, of all namespaces together"""
        self._rules = rules
        self._index = TextIndex(capacity)

    def begin(self, namespace: str, prompt_ids: Sequence[int]) -> NgramDraft:
        return NgramDraft(self._index, self._rules, namespace, prompt_ids)
