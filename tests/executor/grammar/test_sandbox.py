"""The real process, over the tiny vocabulary."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from sapwood.base.errors import InvalidRequest, Overloaded
from sapwood.executor.grammar.backends import make_one
from sapwood.executor.grammar.sandbox import GrammarSandbox, Setting, TrialCancelled
from sapwood.executor.grammar.sandbox_process import try_out
from sapwood.schema import grammar as grammars
from sapwood.schema.config.grammar import GrammarConfig
from sapwood.schema.grammar import Grammar
from tests.executor.grammar.conftest import EOS
from tests.tiny import VOCAB, write_tokenizer

LIMIT_S = 2.0

CHAINED_REFS = {
    "$defs": {
        **{f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(5000)},
        "a5000": {"type": "integer", "multipleOf": 3},
    },
    "$ref": "#/$defs/a0",
}
MANY_OPTIONALS = "[a-c]?" * 40_000
NESTED_LISTS = {
    "$defs": {
        "a": {
            "anyOf": [
                {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": i + 1}
                for i in range(480)
            ]
        }
    },
    "$ref": "#/$defs/a",
}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    made = GrammarSandbox(
        Setting(
            tokenizer_path=str(directory),
            vocab_size=VOCAB,
            ends=[EOS],
            config=GrammarConfig(),
            backend="llguidance",
            timeout_s=LIMIT_S,
        )
    )
    yield made
    made.close()


def test_what_compiles_passes(sandbox):
    for grammar in (grammars.regex("a+"), grammars.json_object(), grammars.choice(["a", "b"])):
        sandbox.begin(grammar).wait()


def test_a_refusal_is_the_compilers_own(sandbox):
    trial = sandbox.begin(grammars.json_schema({"type": "array", "uniqueItems": True}))
    with pytest.raises(InvalidRequest, match="uniqueItems") as raised:
        trial.wait()
    assert raised.value.param == "json_schema"


@pytest.mark.parametrize(
    "grammar",
    [
        pytest.param(
            Grammar(kind="json_schema", text=json.dumps(CHAINED_REFS)), id="chained references"
        ),
        pytest.param(grammars.regex(MANY_OPTIONALS), id="optional parts"),
        pytest.param(
            Grammar(kind="json_schema", text=json.dumps(NESTED_LISTS)), id="lists in lists"
        ),
    ],
)
def test_what_would_end_or_stop_the_engine_is_refused_in_time(sandbox, grammar):
    sandbox.begin(grammars.regex("ready")).wait()
    begin_s = time.monotonic()
    with pytest.raises(InvalidRequest, match="make it simpler"):
        sandbox.begin(grammar).wait()
    assert time.monotonic() - begin_s < 3 * LIMIT_S
    sandbox.begin(grammars.regex("still there")).wait()


def test_a_slow_trial_keeps_no_other_waiting(sandbox):
    sandbox.begin(grammars.regex("ready")).wait()
    slow = sandbox.begin(Grammar(kind="json_schema", text=json.dumps(CHAINED_REFS)))
    for number in range(2):
        sandbox.begin(grammars.regex(f"a{{{number + 1}}}")).wait()
    assert not slow.answer.done()
    slow.cancel()
    with pytest.raises(TrialCancelled):
        slow.wait()


def test_from_many_threads(sandbox):
    with ThreadPoolExecutor(4) as threads:
        trials = threads.map(
            lambda number: sandbox.begin(grammars.regex(f"{'x' * 500}{number}")).wait(), range(40)
        )
        assert list(trials) == [None] * 40


def test_a_process_that_dies_is_started_anew(sandbox):
    sandbox.begin(grammars.regex("ready")).wait()
    slow = sandbox.begin(Grammar(kind="json_schema", text=json.dumps(CHAINED_REFS)))
    os.kill(sandbox._process.pid, signal.SIGKILL)
    with pytest.raises(Overloaded, match="send the request again"):
        slow.wait()
    sandbox.begin(grammars.regex("b")).wait()


def test_nothing_is_left_when_it_closes(sandbox):
    sandbox.begin(grammars.regex("ready")).wait()
    slow = sandbox.begin(Grammar(kind="json_schema", text=json.dumps(CHAINED_REFS)))
    process = psutil.Process(sandbox._process.pid)
    deadline = time.monotonic() + 10
    while not process.children():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    family = [process, *process.children()]
    sandbox.close()
    with pytest.raises(Overloaded):
        slow.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    with pytest.raises(Overloaded, match="ending"):
        sandbox.begin(grammars.regex("c"))


HOSTILE = "(((a{1,1000}){1,1000}){1,1000})"


@pytest.mark.parametrize("backend", ["llguidance", "xgrammar"])
def test_a_grammar_that_becomes_slow_is_refused_before_it_is_followed(vocabulary, backend):
    """Review 2, number 2: a regex of 31 characters stalled all other requests."""
    made = make_one(backend, GrammarConfig(), vocabulary)
    with pytest.raises(InvalidRequest, match="cannot be followed"):
        try_out(made, grammars.regex(HOSTILE), vocabulary)
    for usual in (grammars.regex("[a-zA-Z ,.]{10,200}"), grammars.json_object()):
        try_out(made, usual, vocabulary)
