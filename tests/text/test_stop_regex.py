"""Regular expressions over text that arrives in parts, against Python's own."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.base.errors import InvalidRequest
from sapwood.text import stop_regex
from sapwood.text.stop_regex import (
    LOOK_BACK,
    MAX_CLASSES,
    MAX_KEPT,
    MAX_STATES,
    StopRegex,
    check_patterns,
)
from sapwood.text.stops import StopMatcher, StopResult

ATOMS = st.sampled_from(["a", "b", "é", ".", "[ab]", "[^a]", r"\w", r"\s", r"\n", r"\W", "(?i:B)"])


def combined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}", "+?"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
    )


PATTERNS = st.recursive(ATOMS, combined, max_leaves=6)
TEXTS = st.text(alphabet="abBé \n", max_size=20)


def first_match(text: str, patterns: list[str], strings: list[str]) -> tuple[int, int, str] | None:
    """(begin, end, which) of the first to be complete, the longest of those, by trying all."""
    for end in range(1, len(text) + 1):
        found = [(end - len(one), one) for one in strings if text[:end].endswith(one)]
        for pattern in patterns:
            compiled = re.compile(pattern)
            begins = [b for b in range(end) if compiled.fullmatch(text, b, end)]
            found += [(min(begins), pattern)] if begins else []
        if found:
            begin, which = min(found)
            return begin, end, which
    return None


def feed(matcher: StopMatcher, parts: list[str]) -> tuple[str, str | None]:
    shown = ""
    for part in parts:
        result = matcher.push(part)
        shown += result.text
        if result.matched is not None:
            return shown, result.matched
    result = matcher.finish()
    return shown + result.text, result.matched


@given(
    patterns=st.lists(PATTERNS, min_size=1, max_size=3),
    strings=st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=2),
    text=TEXTS,
    cuts=st.lists(st.integers(0, 20)),
    no_trim=st.booleans(),
)
def test_any_split_gives_what_pythons_re_gives(patterns, strings, text, cuts, no_trim):
    usable = [one for one in patterns if not re.compile(one).fullmatch("")]
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[start:end] for start, end in itertools.pairwise(bounds)]
    shown, matched = feed(StopMatcher(strings, regexes=usable, no_trim=no_trim), parts)
    expected = first_match(text, usable, strings)
    if expected is None:
        assert (shown, matched) == (text, None)
    else:
        begin, end, which = expected
        assert (shown, matched) == (text[: end if no_trim else begin], which)


@pytest.mark.parametrize(
    ("pattern", "text", "shown"),
    [
        (r"\bEND\b", "SEND ENDX END.", "SEND ENDX "),
        (r"\bEND\b", "the END", "the "),
        (r"(?m)^stop$", "a stop\nstop\n", "a stop\n"),
        (r"^ab", "ab", ""),
        (r"^b", "ab", "ab"),
        (r"(?i)halt", "x HaLt y", "x "),
        (r"\d{3}-\d{4}", "call 555-12 or 555-1234 now", "call 555-12 or "),
        (r"(?s)<b>.*</b>", "a<b>x\ny</b>z", "a"),
        (r"(?a)\w+!", "é ab!", "é "),
    ],
)
def test_what_it_knows(pattern, text, shown):
    for size in (1, 3, len(text)):
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        matched = None if shown == text else pattern
        assert feed(StopMatcher([], regexes=[pattern]), parts) == (shown, matched)


def test_it_holds_back_only_what_may_yet_match():
    matcher = StopMatcher([], regexes=[r"\n+User:"])
    assert matcher.push("one\n\n") == StopResult("one")
    assert matcher.push("\ntwo") == StopResult("\n\n\ntwo")
    assert matcher.push("\nUse") == StopResult("")
    assert matcher.push("r: x") == StopResult("", r"\n+User:")


def test_it_does_not_try_one_way_after_the_other():
    """With backtracking this would take 2^2000 steps."""
    text = "a" * 2000
    assert feed(StopMatcher([], regexes=["(a|aa)+x"]), [text]) == (text, None)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("a*", "empty text"),
        ("^", "empty text"),
        ("(a", "not a regular expression"),
        ("(?=x)y", "look-around"),
        (r"(a)\1", "back-reference"),
        ("a++", "possessive"),
        ("x$", "end of the text"),
        (r"x\Z", "end of the text"),
        ("a" * 2001, "more than 2000 characters"),
        ("(a{100}){100}", "states"),
        ("a{99999999999}", "not a regular expression"),
        ("(" * 900 + "a" + ")" * 900, "nested too deeply"),
        ("(((a{1000}){1000}){1000}){1000}", "states"),
        ("a{4294967294}", "states"),
        ("".join(f"[{chr(200 + i)}-{chr(400 + i)}]" for i in range(200)), "different classes"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(pattern, why):
    with pytest.raises(InvalidRequest, match=why) as caught:
        StopRegex([pattern])
    assert caught.value.param == "stop_regex"
    assert len(caught.value.message) < 300


def test_all_of_a_request_together_are_bounded():
    one = "a{400}"
    check_patterns([one, one])
    with pytest.raises(InvalidRequest, match=f"than the {MAX_STATES}"):
        check_patterns([one] * 3)
    classes = "".join(f"[{chr(200 + i)}-{chr(400 + i)}]" for i in range(MAX_CLASSES))
    check_patterns([classes, classes])
    with pytest.raises(InvalidRequest, match=f"than the {MAX_CLASSES}"):
        check_patterns([classes, "[y-z]"])


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "pattern",
    [
        "(){4294967294}x",
        "((){4294967294}){4294967294}x",
        r"(\b|^|){4294967294}\Bx",
        "(a{0}|b{0,0}){4294967294}x",
        "(" + "()" * 400 + "){4294967294}x",
        "(" + "|" * 400 + "){4294967294}x",
    ],
)
def test_what_consumes_nothing_is_not_repeated(pattern):
    check_patterns([pattern])
    matched = None if "B" in pattern else pattern
    assert feed(StopMatcher([], regexes=[pattern]), [" x"]) == (
        " x" if "B" in pattern else " ",
        matched,
    )


HOSTILE = [
    "a{400}x",
    "(?:a|b)*a(?:a|b){130}x",
    "a?" * 300 + "x",
    "(?:" * 49 + "a" + ")*" * 49 + "x",
    r"(?:\b\w+\b\W*){60}x",
    r"(?m)(?:^.*$\n?){60}x",
    "a.*zzz",
]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_the_work_per_character_is_bounded(pattern, monkeypatch):
    """Unions of states are all that depends on how many states there are."""
    num_unions = 0
    union = stop_regex._Union.of

    def counted(self, states):
        nonlocal num_unions
        num_unions += 1
        return union(self, states)

    monkeypatch.setattr(stop_regex._Union, "of", counted)
    stop_regex.compiled.cache_clear()
    matcher = StopMatcher([], regexes=[pattern])
    rng = random.Random(0)
    text = "".join(rng.choice("ab a\n") for _ in range(1000)) + "a" * 1000
    for begin in range(0, len(text), 4):
        assert matcher.push(text[begin : begin + 4]).matched is None
    # Two for each move that is not known, and what looking back takes.
    assert num_unions < 5 * len(text) + LOOK_BACK.stop


@pytest.mark.parametrize("pattern", HOSTILE)
def test_what_is_kept_is_bounded(pattern):
    regex = StopRegex([pattern])
    search = stop_regex.RegexSearch(regex)
    rng = random.Random(0)
    for _ in range(5000):
        search.push(chr(rng.choice([97, 98, 10, 32, rng.randrange(0x100, 0x3000)])))
        search.earliest()
    for table in (regex.moves, regex._masks, regex._unions):
        assert 0 < len(table) <= MAX_KEPT
    assert len(regex._places) <= 25


def test_the_longest_of_several_patterns_wins_and_is_named():
    regexes = ["b+c", "a+b+c", "[bc]"]
    assert feed(StopMatcher([], regexes=regexes), ["xaab", "c"]) == ("xaa", "[bc]")
    assert feed(StopMatcher([], regexes=regexes[:2]), ["xaab", "c"]) == ("x", "a+b+c")
