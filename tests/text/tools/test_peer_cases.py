"""The cases of SGLang's detector tests: equal, or listed in docs/tool-calls.md with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sapwood.text.answer import AnswerShape
from sapwood.text.events import Answer, CallCut, CallEnd, CallFailed, CallStart
from sapwood.text.tools.format import ToolSet
from sapwood.text.tools.registry import TOOL_FORMATS
from tests.text.tools.checks import check_nothing_lost, in_two, read
from tests.text.tools.peer_cases import CASES, Case

PAGE = Path(__file__).parents[3] / "docs/tool-calls.md"
LISTED = [case for case in CASES if case.differs]
CUT = [case for case in CASES if case.cut]


def shape_of(case: Case) -> AnswerShape:
    tools = ToolSet(parameters=case.tools, keeps_unknown=case.keeps_unknown)
    return AnswerShape(calls=TOOL_FORMATS.get(case.parser)(), tools=tools)


def asked_for(case: Case, answer: Answer) -> bool:
    """Whether the answer is what SGLang's test asks for."""
    whole = [(call.name, json.loads(call.arguments)) for call in answer.calls if not call.is_cut]
    cut = [(call.name, call.arguments) for call in answer.calls if call.is_cut]
    shown = " ".join(answer.content.split())
    is_content = case.content is None or shown == " ".join(case.content.split())
    return whole == list(case.calls) and cut == ([case.cut] if case.cut else []) and is_content


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_is_equal_or_listed(case):
    answer = shape_of(case).parsed(case.text, is_cut=case.cut is not None)
    assert asked_for(case, answer) != bool(case.differs), answer


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_in_pieces_gives_the_same(case):
    """In two pieces, split everywhere, and character by character."""
    shape, is_cut = shape_of(case), case.cut is not None
    whole = check_nothing_lost(shape, case.text, is_cut=is_cut)
    assert read(shape, case.text, is_cut=is_cut) == whole
    for parts in in_two(case.text):
        assert read(shape, parts, is_cut=is_cut) == whole, parts


@pytest.mark.parametrize("case", CUT, ids=lambda case: case.name)
def test_a_call_that_is_cut_off_is_announced_once(case):
    shape = shape_of(case)
    for is_cut in (True, False):
        events = read(shape, case.text, is_cut=is_cut)
        ends = [event for event in events if isinstance(event, CallEnd | CallCut | CallFailed)]
        starts = [event for event in events if isinstance(event, CallStart)]
        assert len(starts) == len(ends) == len(case.calls) + 1
        assert isinstance(ends[-1], CallCut if is_cut else CallFailed)
        assert starts[-1].name == case.cut[0]


def test_at_most_five_percent_are_listed_and_the_page_says_so():
    assert len(LISTED) <= 0.05 * len(CASES)
    text = PAGE.read_text()
    reasons = set(re.findall(r"^\| `([a-z-]+)` \|", text.partition("| Reason |")[2], re.MULTILINE))
    assert reasons == {case.differs for case in LISTED}
    assert set(re.findall(r"`([^`\n]+:[^`\n]+)`", text)) >= {case.name for case in LISTED}
    assert f"{len(CASES)} cases" in text
    assert f"{len(LISTED)} of them" in text
