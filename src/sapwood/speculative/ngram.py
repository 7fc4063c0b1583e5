"""Guesses copied from text: what followed the last tokens when they came before.

Text is the prompts and outputs of all requests of a namespace, the request's own among them. The
places where the last tokens came before, and what follows each of them, are a trie, of which the
likeliest branches are guessed: a chain, or a tree.

Source: prompt lookup decoding, as in Hugging Face transformers (`prompt_lookup_num_tokens`); the
trie over all requests and the names of its options are SGLang's. It needs no draft model, and pays
where an output repeats text: in edits, summaries and code.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from sapwood.schema.draft_tree import ROOT
from sapwood.speculative.interface import NO_GUESSES, Guesses
from sapwood.speculative.text_index import LONG_END, Text, TextIndex, common_end

MOST_LOOKED_AT = 16
"""Places with the same end that are looked at: a prompt may be one token, again and again."""
MOST_SHORT_LOOKED_AT = 4
"""The same where only the last token or two are alike."""
MOST_MATCHES = 4
"""Places with the longest match whose continuations are compared."""
MOST_SHORTER = 6
"""Places with shorter matches that may add branches to a tree."""
SIBLING_LENGTH = 7
"""Tokens that are guessed in a row after another one was likelier."""
MATCH_CLASSES = 12
"""Matches of this length and longer are right equally often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramRules:
    """What counts as a match, and how much of what follows is guessed.

    least_match, most_match  tokens that must repeat; tokens that are compared
    branch_length  tokens that are guessed in a row
    by_frequency  of several tokens that followed, the most frequent first; else the latest first
    least_breadth, most_breadth  guesses that may follow the same token: `most` after a match of
                  least_match tokens, `least` after one of most_match tokens; 1 and 1: chains
    """

    least_match: int = 1
    most_match: int = 12
    branch_length: int = 31
    by_frequency: bool = False
    least_breadth: int = 1
    most_breadth: int = 1

    def breadth(self, match: int) -> int:
        """How many guesses may follow a match of that length."""
        missing = min(max(self.most_match - match, 0), self.most_match - self.least_match)
        more = (self.most_breadth - self.least_breadth) * missing
        return self.least_breadth + more // max(self.most_match - self.least_match, 1)


@dataclass(frozen=True, slots=True)
class _Branch:
    """What followed a place.

    match  how many tokens before the place are those at the text's end
    """

    match: int
    token_ids: array[int]


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
        matches = self._matches()
        if not matches:
            return NO_GUESSES
        rules = self._drafter.rules
        most = min(most, rules.branch_length)
        branches = [
            _Branch(length, self._following(text, index, most)) for length, text, index in matches
        ]
        tree = _Tree(rules, branches[0].match)
        tree.grow(ROOT, 0, branches, most)
        return tree.guesses()

    def close(self) -> None:
        """The text stays for other requests."""

    def _matches(self) -> list[tuple[int, Text, int]]:
        """(the match's length, text, index) of the latest places that end like the text and go on:
        first those with the longest match; then, for a tree, some with shorter ones."""
        rules, text = self._drafter.rules, self._text
        for is_long, most_looked_at in ((True, MOST_LOOKED_AT), (False, MOST_SHORT_LOOKED_AT)):
            if is_long and rules.most_match < LONG_END:
                continue
            longest, found = rules.least_match, list[tuple[int, Text, int]]()
            shorter = list[tuple[int, Text, int]]()
            for number, (other, index) in enumerate(self._index.ending_like(text, is_long=is_long)):
                if number == most_looked_at:
                    break
                if index + 1 == len(other.tokens):
                    continue
                length = common_end(text, other, index, rules.most_match)
                if length > longest:
                    shorter += found
                    longest, found = length, [(length, other, index)]
                elif length == longest and len(found) < MOST_MATCHES:
                    found.append((length, other, index))
                elif length == rules.most_match:
                    break
                elif rules.least_match <= length < longest:
                    shorter.append((length, other, index))
            if found and rules.most_breadth > 1:
                shorter.sort(key=lambda match: -match[0])
                return found + shorter[:MOST_SHORTER]
            if found:
                return found
        return []

    def _following(self, other: Text, index: int, most: int) -> array[int]:
        """What followed a match; if that reaches the text's own end, the text between the two
        repeats itself."""
        follows = other.tokens[index + 1 : index + 1 + most]
        if other is self._text and len(follows) < most:
            follows *= -(-most // len(follows))
        return follows[:most]


class _Tree:
    """Guesses that grow out of branches."""

    def __init__(self, rules: NgramRules, longest: int) -> None:
        """longest  match of any branch"""
        self._rules = rules
        self._longest = longest
        self._token_ids: list[int] = []
        self._kinds: list[int] = []
        self._parents: list[int] = []

    def guesses(self) -> Guesses:
        is_chain = self._parents == list(range(ROOT, len(self._parents) - 1))
        parents: Sequence[int] = () if is_chain else self._parents
        return Guesses(token_ids=self._token_ids, kinds=self._kinds, parents=parents)

    def grow(self, node: int, depth: int, branches: Sequence[_Branch], most: int) -> None:
        """Add what follows a node: the likeliest way, up to `most` tokens, then its siblings.

        depth     tokens of the branches before that
        branches  those that go through the node: long matches first, of equal ones the latest
        """
        siblings: list[tuple[int, int, list[_Branch]]] = []
        end = depth + most
        while depth < end:
            branches = [branch for branch in branches if depth < len(branch.token_ids)]
            if len(branches) <= 1:
                for branch in branches:
                    self._add_rest(node, depth, branch, end)
                break
            match = branches[0].match
            first, *others = self._following(branches, depth)
            num_going = sum(branch.match == match for branch in branches)
            num_agreeing = sum(branch.match == match for branch in first)
            breadth = self._rules.breadth(match + depth)
            siblings += [(node, depth, group) for group in others[: breadth - 1]]
            node = self._add(node, first, depth, _kind(match + depth, num_agreeing, num_going))
            branches, depth = first, depth + 1
        for parent, at, group in siblings:
            kind = _sibling_kind(group[0].match + at, is_longest=group[0].match == self._longest)
            self.grow(self._add(parent, group, at, kind), at + 1, group, SIBLING_LENGTH - 1)

    def _add_rest(self, node: int, depth: int, branch: _Branch, end: int) -> None:
        """Add a chain: the tokens depth .. end of a branch that is alone."""
        rest = branch.token_ids[depth:end].tolist()
        first = len(self._token_ids)
        self._token_ids += rest
        self._kinds += [_kind(branch.match + depth + more, 1, 1) for more in range(len(rest))]
        self._parents += [node, *range(first, first + len(rest) - 1)]

    def _following(self, branches: Sequence[_Branch], depth: int) -> list[list[_Branch]]:
        """The branches by their token at this depth, the likeliest token first."""
        groups: dict[int, list[_Branch]] = {}
        for branch in branches:
            groups.setdefault(branch.token_ids[depth], []).append(branch)
        if not self._rules.by_frequency:
            return list(groups.values())
        return sorted(groups.values(), key=lambda group: (-group[0].match, -len(group)))

    def _add(self, parent: int, group: Sequence[_Branch], depth: int, kind: int) -> int:
        self._token_ids.append(group[0].token_ids[depth])
        self._kinds.append(kind)
        self._parents.append(parent)
        return len(self._parents) - 1


KINDS = 5
"""Of a match's length: three of the likeliest token after it, two of its siblings."""


def _kind(match: int, num_agreeing: int, num_going: int) -> int:
    """By the length of the match and by how many of several matches agree."""
    agreement = 0 if num_going == 1 else 1 + (num_agreeing == num_going)
    return min(match, MATCH_CLASSES) * KINDS + agreement


def _sibling_kind(match: int, *, is_longest: bool) -> int:
    return min(match, MATCH_CLASSES) * KINDS + 3 + is_longest
