from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from sapwood.executor.sampling import custom
from sapwood.executor.sampling.custom import CustomLogitProcessor, CustomProcessors
from sapwood.schema.logits_processors import BUILT_IN, code_of, known_processors
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import RowStart

VOCAB = 10


class Only(CustomLogitProcessor):
    """Allows one token, and then as many others as were put out."""

    def __call__(self, logits: Tensor, custom_param_list: list[dict[str, Any]]) -> Tensor:
        [params] = custom_param_list
        token = params["token"] + len(params["__req__"].output_ids)
        allowed = torch.full_like(logits, -torch.inf)
        allowed[:, token] = 0.0
        return allowed


def start(name: str | None, *, row: int = 0, output: Sequence[int] = (), **params: Any) -> RowStart:
    sampling = SamplingParams(custom_logit_processor=name, custom_params=params)
    return RowStart(
        row=row,
        options=RequestOptions(sampling=sampling),
        seed=0,
        prompt_ids=[1, 2],
        output_ids=list(output),
    )


def apply(processors: CustomProcessors, rows: Sequence[int] = (0,)) -> Tensor:
    logits = torch.arange(VOCAB, dtype=torch.float32).repeat(len(rows), 1)
    processors.apply(logits, rows, [0] * len(rows))
    return logits


def test_a_registered_one_is_made_for_its_request_only() -> None:
    failures: dict[int, str] = {}
    processors = CustomProcessors(failures, allow_code=False)
    processors.start(start("disallowed_tokens", row=1, token_ids=[9, 8]))
    processors.start(start(None, row=0))
    assert apply(processors, [0, 1]).argmax(-1).tolist() == [9, 7]
    processors.start(start(None, row=1))
    assert apply(processors, [0, 1]).argmax(-1).tolist() == [9, 9]
    assert failures == {}


def test_entry_points_add_some(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(params: Mapping[str, Any], prompt_ids: Sequence[int]) -> custom.Process:
        seen.append((dict(params), list(prompt_ids)))
        return lambda logits, output_ids: logits.roll(len(output_ids))

    seen: list[Any] = []
    monkeypatch.setattr(custom.LOGITS_PROCESSORS, "_plugins", lambda: {"mine": Point(make)})
    processors = CustomProcessors({}, allow_code=False)
    processors.start(start("mine", output=[5], a=1))
    processors.accept([0], [6])
    assert apply(processors).argmax(-1).tolist() == [1]
    assert seen == [({"a": 1}, [1, 2])]


class Point:
    def __init__(self, target: object) -> None:
        self._target = target

    def load(self) -> object:
        return self._target


def test_code_runs_only_where_it_is_allowed() -> None:
    code = Only.to_str()
    for allow_code in (False, True):
        failures: dict[int, str] = {}
        processors = CustomProcessors(failures, allow_code=allow_code)
        processors.start(start(code, output=[3], token=4))
        logits = apply(processors)
        if allow_code:
            assert failures == {}
            assert logits.argmax(-1).tolist() == [5]
        else:
            assert "takes no code" in failures[0]


def test_the_base_class_of_sglangs_clients_is_known() -> None:
    """Their classes travel by value, but their base class by its name."""
    name = b"csglang.srt.sampling.custom_logit_processor\nCustomLogitProcessor\n."
    assert custom._Unpickler(io.BytesIO(name)).load() is CustomLogitProcessor


def broken(kind: str) -> custom.Process:
    def process(logits: Tensor, output_ids: Sequence[int]) -> Any:
        if kind == "raises":
            raise KeyError("missing")
        if kind == "shape":
            return logits[:3]
        if kind == "type":
            return 5
        return logits * torch.nan if kind == "nan" else logits - torch.inf

    return process


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("raises", "KeyError"),
        ("shape", r"returned \[3\] instead of \[10\]"),
        ("type", "returned int"),
        ("nan", "largest logit is nan"),
        ("nothing", "largest logit is -inf"),
    ],
)
def test_what_fails_ends_its_own_request(
    kind: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = Point(lambda params, prompt_ids: broken(kind))
    monkeypatch.setattr(custom.LOGITS_PROCESSORS, "_plugins", lambda: {"bad": point})
    failures: dict[int, str] = {}
    processors = CustomProcessors(failures, allow_code=False)
    processors.start(start("bad", row=3))
    logits = apply(processors, [0, 3])
    assert list(failures) == [3]
    assert re.search(message, failures[3])
    assert logits.isfinite().all()
    assert int(logits[0].argmax()) == 9


def test_what_cannot_be_made_fails_when_it_is_needed() -> None:
    failures: dict[int, str] = {}
    processors = CustomProcessors(failures, allow_code=True)
    processors.start(start("unheard-of", row=1))
    processors.start(start(msgspec.json.encode({"callable": "zz"}).decode(), row=2))
    assert failures == {}
    apply(processors, [1, 2])
    assert "unknown custom logit processor 'unheard-of'" in failures[1]
    assert "cannot be made" in failures[2]


def test_names_and_code_are_told_apart() -> None:
    assert code_of("disallowed_tokens") is None
    assert code_of('{"callable": "80"}') == "80"
    assert code_of('{"other": 1}') == ""
    assert set(BUILT_IN) <= known_processors()
