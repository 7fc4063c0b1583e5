"""Files of sound through OpenAI's official client, heard by a tiny Whisper."""

from __future__ import annotations

import io
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.e2e.server import Server, serving
from tests.hearing import save


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("whisper") / "model")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with serving("--model", str(model), "--dtype", "float32", "--max-audio-seconds", "30") as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def sound(seconds: float, seed: int = 0) -> bytes:
    samples = np.random.default_rng(seed).integers(-9000, 9000, int(16_000 * seconds))
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.astype("<i2").tobytes())
    return out.getvalue()


def test_every_format_has_the_same_text(client: openai.OpenAI) -> None:
    def ask(response_format: str) -> object:
        return client.audio.transcriptions.create(
            model="default",
            file=("a.wav", sound(0.45)),
            language="en",
            temperature=0.01,
            prompt="Oaks.",
            response_format=response_format,  # type: ignore[call-overload]
        )

    verbose = ask("verbose_json")
    assert isinstance(verbose, openai.types.audio.TranscriptionVerbose)
    assert verbose.language == "english"
    assert verbose.duration == 0.45
    assert verbose.segments
    assert [one.id for one in verbose.segments] == list(range(len(verbose.segments)))
    assert all(0 <= one.start <= one.end <= 0.45 for one in verbose.segments)
    plain = ask("json")
    assert isinstance(plain, openai.types.audio.Transcription)
    assert plain.text == verbose.text != ""
    assert plain.usage is not None
    assert plain.usage.to_dict() == {"type": "duration", "seconds": 1}
    assert ask("text") == plain.text + "\n"
    srt, vtt = ask("srt"), ask("vtt")
    assert isinstance(srt, str)
    assert isinstance(vtt, str)
    assert srt.count(" --> ") == vtt.count(" --> ") == len(verbose.segments)


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    def ask(stream: bool) -> Any:
        return client.audio.transcriptions.create(
            model="default",
            file=("a.wav", sound(1.5, 3)),
            language="de",
            temperature=0.01,
            stream=stream,
        )

    whole, events = ask(False), list(ask(True))
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == whole.text
    deltas = [one.delta for one in events if one.type == "transcript.text.delta"]
    assert "".join(deltas).rstrip() == whole.text
    # A tiny model's sound has 0.48 s, so there are several pieces.
    assert len(deltas) > 2


def test_a_translation_is_to_english(server: Server) -> None:
    url = f"{server.url}/v1/audio/translations"
    files, fields = {"file": ("a.wav", sound(0.4, 5))}, {"temperature": "0.01"}
    answer = httpx.post(url, data={**fields, "response_format": "verbose_json"}, files=files)
    assert answer.json()["task"] == "translate"
    answer = httpx.post(url, data={**fields, "language": "de"}, files=files)
    assert answer.status_code == 400
    assert "a translation is to English" in answer.json()["message"]


@pytest.mark.parametrize(
    ("fields", "data", "why"),
    [
        ({"language": "klingon"}, sound(0.2), "language is 'klingon'"),
        ({"response_format": "xml"}, sound(0.2), "response_format"),
        ({"temperature": "7"}, sound(0.2), "temperature"),
        ({"timestamp_granularities[]": "word"}, sound(0.2), "times of words"),
        ({"model": "other"}, sound(0.2), "not served here"),
        ({"prompt": "x" * 10_001}, sound(0.2), "prompt has 10001 characters"),
        ({"stream": "true", "response_format": "srt"}, sound(0.2), "must be json"),
        ({"colour": "red"}, sound(0.2), "colour"),
        ({}, b"no sound at all", "cannot be decoded"),
        ({}, b"", "file is empty"),
        ({}, sound(31.0), "longer than 30 s"),
    ],
)
def test_bad_forms_are_refused_by_name(
    server: Server, fields: dict[str, str], data: bytes, why: str
) -> None:
    files = {"file": ("a.wav", data)}
    answer = httpx.post(f"{server.url}/v1/audio/transcriptions", data=fields, files=files)
    assert answer.status_code in (400, 404)
    assert why in answer.json()["message"]


def test_other_routes_say_where_sounds_go(server: Server) -> None:
    body = {"prompt": "hello", "max_tokens": 2}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert "/v1/audio/transcriptions" in answer.json()["message"]
    answer = httpx.post(f"{server.url}/v1/audio/transcriptions", json=body)
    assert "multipart/form-data" in answer.json()["message"]
