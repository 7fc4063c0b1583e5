"""Pictures from a Python program, in every form that it may have them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapwood import LLM
from sapwood.base.errors import InvalidRequest, UnsupportedFeature
from tests.app.llms import llms_of
from tests.pictures import data_url, picture, png
from tests.served_sight import MARKER, save_served

GREEDY = {"max_new_tokens": 6, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    model = save_served(tmp_path_factory.mktemp("sight"))
    with llms_of(model, page_size=4, max_total_tokens=2048) as make:
        yield make()


def test_all_forms_are_one_picture(llm: LLM, tmp_path: Path) -> None:
    shown = picture(52, 36)
    path = tmp_path / "picture.png"
    path.write_bytes(png(shown))
    with_alpha = np.dstack([np.asarray(shown), np.full((36, 52), 255, np.uint8)])
    forms: list[Any] = [
        shown, np.asarray(shown), with_alpha, path, str(path), path.read_bytes(), data_url(shown),
    ]  # fmt: skip
    before = llm.stats().media
    found = [llm.generate(f"a{MARKER}", GREEDY, images=form)[0] for form in forms]
    found.append(llm.chat([{"role": "user", "content": "a"}], GREEDY, images=[])[0])
    assert found.pop().num_prompt_tokens == 1
    parts: list[Any] = [{"type": "text", "text": "a"}, {"type": "image", "image": shown}]
    found += llm.chat([{"role": "user", "content": parts}], GREEDY)
    parts[1] = {"type": "image_url", "image_url": {"url": data_url(shown)}}
    found += llm.chat([{"role": "user", "content": parts}], GREEDY)
    streamed = [chunk.text for chunk in llm.stream(f"a{MARKER}", GREEDY, images=shown)]
    assert "".join(streamed) == found[0].text
    assert {one.token_ids for one in found} == {found[0].token_ids}
    assert len({one.num_prompt_tokens for one in found}) == 1
    after = llm.stats().media
    assert before is not None
    assert after is not None
    assert after.num_encoded == before.num_encoded + 1


def test_each_prompt_has_its_own_pictures(llm: LLM) -> None:
    one, two = picture(40, 28), picture(28, 40)
    prompts = [f"a{MARKER}", "only text", f"{MARKER}b{MARKER}"]
    together = llm.generate(prompts, GREEDY, images=[one, None, [two, one]])
    alone = [
        llm.generate(prompts[0], GREEDY, images=one)[0],
        llm.generate(prompts[1], GREEDY)[0],
        llm.generate(prompts[2], GREEDY, images=[two, one])[0],
    ]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    ask = [{"role": "user", "content": "a"}]
    both = llm.chat([ask, ask], GREEDY, images=[one, two])
    first = llm.chat(ask, GREEDY, images=one)
    assert both[0].token_ids == first[0].token_ids
    assert both[0].num_prompt_tokens == both[1].num_prompt_tokens


def test_frames_are_a_video(llm: LLM) -> None:
    frames = [picture(28, 28), picture(28, 28), picture(28, 28), picture(28, 28)]
    found = llm.generate("a<|video_pad|>", GREEDY, videos=[frames])[0]
    again = llm.generate("a<|video_pad|>", GREEDY, videos=[[np.asarray(one) for one in frames]])[0]
    assert found.token_ids == again.token_ids
    assert found.num_prompt_tokens == again.num_prompt_tokens > 2


@pytest.mark.parametrize(
    ("images", "where"),
    [
        (np.zeros((4, 4, 3), np.float32), r"images\[0\] must be"),
        (np.zeros((3, 4, 7), np.uint8), "colours come last"),
        ("/nowhere/at all", r"images\[0\] cannot be read"),
        (b"no picture", r"images\[0\] is no picture"),
        ([None], r"images\[0\] must be"),
        (object(), r"images\[0\] must be"),
        ([picture(28, 28), picture(28, 28)], "the prompt has"),
        ("http://127.0.0.1:1/a.png", "not on the public Internet"),
    ],
)
def test_what_is_no_picture_is_refused_by_its_place(llm: LLM, images: Any, where: str) -> None:
    with pytest.raises(InvalidRequest, match=where):
        llm.generate(f"a{MARKER}", GREEDY, images=images)


def test_wrong_counts_and_kinds_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="an entry for each of the 2 prompts"):
        llm.generate(["a", "b"], GREEDY, images=picture(28, 28))
    parts = [{"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}}]
    with pytest.raises(UnsupportedFeature, match="input_audio"):
        llm.chat([{"role": "user", "content": parts}], GREEDY)
