"""Grammars through the whole engine: scheduler, sampler and masks, with a random tiny model."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from sapwood import LLM
from sapwood.base.errors import InvalidRequest
from sapwood.schema import grammar as grammars
from sapwood.schema.grammar import Thinking
from sapwood.schema.sampling import SamplingParams
from tests.executor.grammar.schemas import random_schema
from tests.tiny import write_llama

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["one", "two"]},
        "tags": {"type": "array", "items": {"type": "integer", "maximum": 9}, "maxItems": 2},
    },
    "required": ["name", "kind", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "tiny")


def make(model: Path, **options: object) -> LLM:
    return LLM(
        str(model),
        load_format="dummy",
        dtype="float32",
        num_threads=1,
        skip_server_warmup=True,
        constrained_json_disable_any_whitespace=True,
        **{"max_total_tokens": 4096, "max_running_requests": 8, "page_size": 4, **options},
    )


VARIANTS: dict[str, dict[str, object]] = {
    "jumps": {},
    "no jumps": {"disable_jump_forward": True},
    "overlap": {"overlap_depth": 2},
    "llguidance": {"grammar_backend": "llguidance"},
    "small pool": {"max_total_tokens": 400, "schedule_conservativeness": 0.0},
    "small pool, overlap": {
        "max_total_tokens": 400,
        "schedule_conservativeness": 0.0,
        "overlap_depth": 2,
    },
}


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def llm(model: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    made = make(model, **VARIANTS[request.param])
    yield made
    made.close()


def state_of(llm: LLM) -> tuple[int, int]:
    """(rows with the state of a grammar, grammars in use)"""
    inner = llm._engine._engine
    runner = inner.executor._execute.__self__
    masks = runner._sampler._grammars
    return len(masks.stateful_rows), masks._grammars.num_used


def params(**fields: object) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 200, "temperature": 1.0, **fields})  # type: ignore[arg-type]


def test_everything_that_ends_matches(llm: LLM) -> None:
    asked = [
        params(grammar=grammars.json_schema(PERSON), seed=1),
        params(grammar=grammars.json_schema(PERSON), seed=2, frequency_penalty=1.5, top_k=3),
        params(grammar=grammars.json_schema(PERSON), seed=3, repetition_penalty=1.7, min_p=0.1),
        params(grammar=grammars.json_schema(PERSON), temperature=0.0),
        params(grammar=grammars.regex("[a-f]{3}-[0-9]{2,9}"), seed=4, top_p=0.5),
        params(grammar=grammars.choice(["north", "south"]), seed=5, min_new_tokens=50),
        params(grammar=grammars.ebnf('root ::= "<" [a-c]+ ">"'), seed=6, logit_bias={0: 50.0}),
        params(seed=7, max_new_tokens=40),
    ]
    results = llm.generate(["Write: "] * len(asked), asked)
    for one, result in zip(asked, results, strict=True):
        if one.grammar is None or result.finish.kind != "stop":
            assert result.finish.kind == "length" or one.grammar is None
            assert result.num_output_tokens <= one.max_new_tokens
        elif one.grammar.kind == "json_schema":
            jsonschema.validate(json.loads(result.text), PERSON)
        elif one.grammar.kind == "regex":
            assert re.fullmatch("[a-f]{3}-[0-9]{2,9}", result.text)
        elif one.grammar.kind == "choice":
            assert result.text in ("north", "south")
        else:
            assert re.fullmatch("<[a-c]+>", result.text)
    stopped = [result.finish.kind == "stop" for result in results]
    assert sum(stopped[:7]) >= 6
    assert stopped[5], "min_new_tokens does not keep a grammar from ending"


def test_a_limit_cuts_it(llm: LLM) -> None:
    [result] = llm.generate("x", params(grammar=grammars.json_schema(PERSON), max_new_tokens=7))
    assert (result.finish.kind, result.num_output_tokens) == ("length", 7)
    assert result.text == '{"name"'


def test_the_same_seed_gives_the_same_alone_and_in_a_batch(llm: LLM) -> None:
    one = params(grammar=grammars.json_schema(PERSON), seed=11, top_k=20)
    [alone] = llm.generate("Write: ", one)
    others = [params(grammar=grammars.regex("[a-z]{30,60}"), seed=i) for i in range(6)]
    together = llm.generate(["Write: "] * 7, [*others, one])[-1]
    assert together.token_ids == alone.token_ids
    [again] = llm.generate("Write: ", one)
    assert again.token_ids == alone.token_ids, "with a prefix hit too"


def test_stop_strings_end_it_as_they_end_anything(llm: LLM) -> None:
    [result] = llm.generate("x", params(grammar=grammars.json_schema(PERSON), stop=('"kind"',)))
    assert result.finish.kind in ("stop", "length")
    assert '"kind"' not in result.text
    if result.finish.kind == "stop":
        assert result.finish.matched == '"kind"'


def test_thinking_comes_first(llm: LLM) -> None:
    thinking = Thinking(end="</t>", is_open=True)
    grammar = grammars.Grammar(kind="regex", text="[a-c]{4}", thinking=thinking)
    bias = {llm.services.tokenizer.encode("<", add_special_tokens=False)[0]: 4.0}
    [result] = llm.generate("x", params(grammar=grammar, seed=3, logit_bias=bias))
    if result.finish.kind == "stop":
        assert re.search("</t>[a-c]{4}$", result.text)
    optional = Thinking(begin="<t>", end="</t>")
    grammar = grammars.Grammar(kind="regex", text="[a-c]{4}", thinking=optional)
    [result] = llm.generate("x", params(grammar=grammar, seed=3))
    assert re.fullmatch("[a-c]{4}", result.text) or result.text.startswith("<t>")


def test_a_schema_that_cannot_be_enforced_is_a_400(llm: LLM) -> None:
    for schema, named in (({"uniqueItems": True}, "uniqueItems"), ({"type": "x"}, "'x'")):
        with pytest.raises(InvalidRequest, match=named):
            llm.generate("x", params(grammar=grammars.json_schema(schema)))


HOSTILE = {
    "endless forced text": (grammars.ebnf('root ::= "ab" root'), True),
    "long forced text": (grammars.ebnf('root ::= "a"{2000000000}'), True),
    "long forced text after a choice": (grammars.ebnf('root ::= [xy] "a"{2000000000}'), True),
    "ambiguous": (grammars.ebnf('root ::= ("a"*)* "b"'), True),
    "nested repeats": (grammars.regex("(((a{100}){100}){100}){100}"), True),
    "compiler out of stack or time": (grammars.regex("[a-c]?" * 20_000), False),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_takes_nobody_along(model: Path, name: str) -> None:
    grammar, is_answered = HOSTILE[name]
    llm = make(model, grammar_compile_timeout=2.0)
    try:
        if is_answered:
            [result] = llm.generate("x", params(grammar=grammar, max_new_tokens=40))
            assert result.finish.kind in ("length", "stop")
        else:
            with pytest.raises(InvalidRequest, match="make it simpler"):
                llm.generate("x", params(grammar=grammar))
        [result] = llm.generate("x", params(grammar=grammars.regex("[a-c]{4}")))
        assert re.fullmatch("[a-c]{4}", result.text)
    finally:
        llm.close()


def test_schemas_of_all_kinds(llm: LLM) -> None:
    num_ended = 0
    schemas = [random_schema(random.Random(seed)) for seed in range(24)]
    asked = [
        params(grammar=grammars.json_schema(one), seed=i, max_new_tokens=220)
        for i, one in enumerate(schemas)
    ]
    for schema, result in zip(schemas, llm.generate(["{"] * len(asked), asked), strict=True):
        if result.finish.kind == "stop":
            num_ended += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(result.text))
    assert num_ended >= 6


def test_a_retracted_request_goes_on_in_its_grammar(model: Path) -> None:
    for depth in (1, 2):
        small = {"max_total_tokens": 200, "schedule_conservativeness": 0.0}
        llm = make(model, **small, overlap_depth=depth)
        try:
            text = "[a-f]{60,70}"
            asked = [params(grammar=grammars.regex(text), seed=i) for i in range(8)]
            for result in llm.generate(["Write: "] * 8, asked):
                assert result.finish.kind == "stop"
                assert re.fullmatch(text, result.text)
            assert llm.stats().num_retractions > 0
            llm.generate("x", params(max_new_tokens=2))
            assert state_of(llm) == (0, 0)
        finally:
            llm.close()


def test_aborts_leave_nothing_behind(llm: LLM) -> None:
    rng = random.Random(5)
    for _ in range(12):
        limit = rng.randint(1, 30)
        asked = params(grammar=grammars.json_schema(PERSON), max_new_tokens=limit)
        stream = llm.stream("x", asked)
        for _, _ in zip(range(rng.randint(1, 20)), stream, strict=False):
            pass
        stream.close()
    llm.generate("x", params(max_new_tokens=2))
    assert state_of(llm) == (0, 0)


def test_without_a_backend_it_is_refused(model: Path) -> None:
    llm = make(model, grammar_backend="none")
    try:
        with pytest.raises(InvalidRequest, match="--grammar-backend none"):
            llm.generate("x", params(grammar=grammars.regex("a")))
        [result] = llm.generate("x", params(max_new_tokens=3))
        assert result.num_output_tokens == 3
    finally:
        llm.close()


def test_a_grammar_that_is_too_large_is_refused(model: Path) -> None:
    llm = make(model, grammar_max_bytes=20)
    try:
        with pytest.raises(InvalidRequest, match="--grammar-max-bytes"):
            llm.generate("x", params(grammar=grammars.json_schema(PERSON)))
    finally:
        llm.close()


def test_parameters_by_name(model: Path) -> None:
    class Model:
        @staticmethod
        def model_json_schema() -> dict[str, object]:
            return PERSON

    llm = make(model)
    try:
        for asked in ({"json_schema": PERSON}, {"json_schema": Model}):
            [result] = llm.generate("x", {**asked, "max_new_tokens": 200, "seed": 1})
            if result.finish.kind == "stop":
                jsonschema.validate(json.loads(result.text), PERSON)
            assert result.text.startswith('{"name": "')
        [result] = llm.generate("x", {"choice": ["north", "south"]})
        assert result.text in ("north", "south")
        [result] = llm.generate("x", {"grammar": grammars.regex("ab+c"), "max_new_tokens": 100})
        assert result.text.startswith("ab")
        with pytest.raises(InvalidRequest, match="both"):
            llm.generate("x", {"regex": "a", "ebnf": "root ::= b"})
    finally:
        llm.close()
