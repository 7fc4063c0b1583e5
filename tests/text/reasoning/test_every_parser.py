"""Every reasoning parser: thinking is told apart, whole or in pieces, and nothing is lost."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapwood.base.errors import ConfigError
from sapwood.text.answer import AnswerShape
from sapwood.text.events import Content, Reasoning
from sapwood.text.reasoning.format import Shown
from sapwood.text.reasoning.registry import REASONING_FORMATS, format_of_template
from sapwood.text.tools.format import ToolSet
from sapwood.text.tools.registry import TOOL_FORMATS
from tests.text.tools.checks import in_two, read
from tests.tiers import examples

FORCED = ["deepseek-r1", "kimi_k2", "minimax", "qwen3-thinking", "step3"]
NOT_FORCED = ["deepseek-v3", "glm45", "interns1", "kimi", "nano_v3", "qwen3"]
TAGS = [*FORCED, *NOT_FORCED]
NAMES = [*TAGS, "gpt-oss", "minimax-append-think"]

PAIRS = [
    ("Two and two is four.", "4"),
    ("", "4"),
    ("Hm.", ""),
    ("Line one.\n\nLine two.", "# Title\n\ntext"),
    ("a < b, <b> and </b>", "if a < b: <p>"),
    ("They said </thin", "<thin"),
    ("Größe 東京 😀", "é 😀"),
    ('I could answer {"a": 1}', '{"a": 1}'),
    ("<think", "</"),
    ("◁thin", "◁/think"),
    ("word " * 40, "word " * 10 + "end"),
    ("1. First\n2. Second", "- x\n- y"),
    ("Is it [TOOL_CALLS]?", "no"),
    ("\ttabs\tinside", "x\ty"),
    ("code: `x = 1`\n```\ny\n```", "```py\nz\n```"),
    ("?", "!"),
]


def shape_of(name: str, *, is_thinking: bool | None = None) -> AnswerShape:
    form = REASONING_FORMATS.get(name)
    thinks = form.is_forced if is_thinking is None else is_thinking
    return AnswerShape(reasoning=form, is_thinking=thinks)


def written(name: str, thought: str, content: str, *, opened: bool) -> str:
    """As the model writes it; opened: its template has written the first tag."""
    form = REASONING_FORMATS.get(name)
    if name == "gpt-oss":
        return (
            f"<|channel|>analysis<|message|>{thought}<|end|>"
            f"<|start|>assistant<|channel|>final<|message|>{content}"
        )
    return f"{'' if opened else form.opens}\n{thought}\n{form.closes}\n\n{content}"


def samples_of(name: str):
    """(text, thought, content)"""
    for thought, content in PAIRS:
        for opened in {False, name in FORCED}:
            yield written(name, thought, content, opened=opened), thought.strip(), content


def test_every_registered_parser_is_tested():
    assert REASONING_FORMATS.names() == sorted(NAMES)
    assert all(len(list(samples_of(name))) >= 15 for name in NAMES)


@pytest.mark.parametrize("name", [*TAGS, "gpt-oss"])
def test_thinking_is_told_apart(name):
    for text, thought, content in samples_of(name):
        answer = shape_of(name).parsed(text)
        assert answer.reasoning.strip() == thought
        assert answer.content == content


@pytest.mark.parametrize("name", NAMES)
def test_every_split_in_two_gives_the_same_and_loses_nothing(name):
    shape = shape_of(name)
    for text, _, _ in samples_of(name):
        whole = read(shape, [text])
        if name != "minimax-append-think":
            assert "".join(event.source for event in whole) == text
        assert read(shape, text) == whole
        for parts in in_two(text):
            assert read(shape, parts) == whole


@settings(max_examples=examples(500))
@given(st.data())
def test_random_splits_give_the_same(data):
    name = data.draw(st.sampled_from(NAMES))
    text, _, _ = data.draw(st.sampled_from(list(samples_of(name))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    bounds = [0, *cuts, len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(bounds)]
    assert read(shape_of(name), parts) == read(shape_of(name), [text])


@pytest.mark.parametrize("name", [*TAGS, "gpt-oss"])
def test_mutated_samples_lose_nothing(name):
    shape = shape_of(name)
    samples = list(samples_of(name))
    random_numbers = random.Random(f"mutations of {name}")
    for _ in range(300):
        raw = bytearray(random_numbers.choice(samples)[0].encode())
        for _ in range(random_numbers.randint(1, 4)):
            at = random_numbers.randrange(len(raw) + 1)
            raw[at : at + random_numbers.randint(0, 6)] = random_numbers.randbytes(
                random_numbers.randint(0, 2)
            )
        text = raw.decode(errors="replace")
        events = read(shape, [text])
        assert "".join(event.source for event in events) == text
        at = random_numbers.randrange(len(text) + 1)
        assert read(shape, [text[:at], text[at:]]) == events


@pytest.mark.parametrize("name", NOT_FORCED)
def test_a_model_that_does_not_think_answers(name):
    for text in ("Hello.", " Hello. ", "I write <think> in the middle", "{}"):
        assert read(shape_of(name), [text]) == [Content(text)]


@pytest.mark.parametrize("name", FORCED)
def test_thinking_that_never_ends_is_thinking(name):
    assert read(shape_of(name), ["Hm, let me"]) == [Reasoning("Hm, let me")]


def test_thinking_goes_out_as_it_comes():
    parser = shape_of("qwen3").parser()
    assert parser.feed("<think>One")[-1] == Reasoning("One")
    assert parser.feed(" two </th") == [Reasoning(" two")]
    assert parser.is_thinking
    assert Reasoning(" </th") not in parser.feed("ink>")
    assert not parser.is_thinking


def test_a_call_ends_thinking_whose_tag_is_forgotten():
    shape = AnswerShape(
        reasoning=REASONING_FORMATS.get("glm45"),
        calls=TOOL_FORMATS.get("glm45")(),
        tools=ToolSet(parameters={"f": {}}),
    )
    answer = shape.parsed("<think>I should call f.\n<tool_call>f\n</tool_call>")
    assert answer.reasoning == "I should call f."
    assert [call.name for call in answer.calls] == ["f"]


def test_calls_in_the_thinking_are_thinking():
    shape = AnswerShape(
        reasoning=REASONING_FORMATS.get("qwen3"),
        calls=TOOL_FORMATS.get("qwen25")(),
        tools=ToolSet(parameters={"f": {}}),
    )
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    answer = shape.parsed(f"<think>\nMaybe {call}\n</think>\n\nOk.\n{call}")
    assert answer.reasoning == f"Maybe {call}"
    assert (answer.content, len(answer.calls)) == ("Ok.", 1)


def test_append_think_gives_the_content_the_tag_that_the_template_wrote():
    shape = shape_of("minimax-append-think")
    assert shape.parsed("Hm.</think>Hi").content == "<think>Hm.</think>Hi"
    assert shape.parsed("<think>Hm.</think>Hi").content == "<think>Hm.</think>Hi"


@pytest.mark.parametrize(
    ("name", "prompt", "prefix", "shown"),
    [
        ("qwen3", "<|im_start|>assistant\n", "", Shown.NOTHING),
        ("qwen3", "<|im_start|>assistant\n<think>\n", "", Shown.OPEN),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "", Shown.CLOSED),
        ("qwen3-thinking", "assistant\n<think>\n\n</think>\n\n", "", Shown.CLOSED),
        ("deepseek-r1", "<｜Assistant｜>", "", Shown.NOTHING),  # noqa: RUF001
        ("qwen3", "assistant\n<think>Well", "<think>Well", Shown.OPEN),
        ("qwen3", "assistant\n<think>W</think>The", "<think>W</think>The", Shown.CLOSED),
        ("qwen3", "assistant\nThe answer", "The answer", Shown.CLOSED),
        ("deepseek-r1", "assistant\nWell", "Well", Shown.NOTHING),
        ("deepseek-r1", "assistant\nWell</think>The", "Well</think>The", Shown.CLOSED),
        ("gpt-oss", "<|start|>assistant", "", Shown.OPEN),
        ("gpt-oss", "<|start|>assistant<|channel|>final<|message|>The", "The", Shown.CLOSED),
    ],
)
def test_what_a_prompt_shows(name, prompt, prefix, shown):
    assert REASONING_FORMATS.get(name).shown_by(prompt, prefix=prefix) is shown


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{{ content.split('</think>')[-1] }}", "qwen3"),
        ("{{ '<think>\\n' }}", "qwen3"),
        ("◁think▷", "kimi"),
        ("<|channel|>analysis", "gpt-oss"),
        ("<arg_key> … </think>", "glm45"),
        ("<|tool_calls_section_begin|> … </think>", "kimi_k2"),
        ("{{ messages[0].content }}", None),
    ],
)
def test_a_template_points_at_its_parser(source, name):
    assert format_of_template(source) == name


def test_a_parser_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"unknown reasoning parser 'nope'.*qwen3"):
        REASONING_FORMATS.get("nope")
