"""Files of sound become samples, pieces and spectra."""

from __future__ import annotations

import asyncio
import io
import wave
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.base.errors import InvalidRequest, Overloaded
from sapwood.multimodal import listener as listening
from sapwood.multimodal.families.whisper import Whisper
from sapwood.multimodal.family import FamilySetting, SoundFamily
from sapwood.multimodal.limits import MediaLimits
from sapwood.multimodal.listener import Listener, Recording
from sapwood.multimodal.mel import RATE
from sapwood.multimodal.sound import cuts_of, samples_of


def wav(samples: np.ndarray, *, rate: int = RATE, channels: int = 1) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return out.getvalue()


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8000, 8000, count).astype(np.int16)


def tone(seconds: float, rate: int = RATE) -> np.ndarray:
    return (8000 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(np.int16)


def test_samples_at_the_models_rate_stay_as_they_are() -> None:
    samples = noise(5000)
    assert (samples_of(wav(samples), max_seconds=10) == samples).all()


@pytest.mark.parametrize("rate", [8000, 44_100])
def test_other_rates_and_two_channels(rate: int) -> None:
    both = np.repeat(tone(0.5, rate), 2)
    found = samples_of(wav(both, rate=rate, channels=2), max_seconds=10)
    assert len(found) == pytest.approx(RATE / 2, abs=20)
    middle = slice(RATE // 8, RATE // 4)
    expected = tone(0.5)[middle].astype(float)
    assert np.corrcoef(found[middle].astype(float), expected)[0, 1] > 0.99


@pytest.mark.parametrize(("container", "codec"), [("flac", "flac"), ("mp4", "aac")])
def test_compressed_files(container: str, codec: str) -> None:
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=RATE, layout="mono")
        shape = "s16" if codec == "flac" else "fltp"
        samples = tone(0.5)
        data = samples if shape == "s16" else (samples / 32768).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(data.reshape(1, -1), format=shape, layout="mono")
        frame.sample_rate, frame.time_base = RATE, Fraction(1, RATE)
        for packet in (*stream.encode(frame), *stream.encode(None)):
            file.mux(packet)
    found = samples_of(out.getvalue(), max_seconds=10)
    assert len(found) == pytest.approx(len(samples), abs=2048)


def test_what_is_no_sound_or_too_long_is_refused() -> None:
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    for bad in (b"hello", b"RIFF" + bytes(60), playlist, wav(noise(500))[:40], b"\xff\xfb" * 400):
        with pytest.raises(InvalidRequest):
            samples_of(bad, max_seconds=10)
    with pytest.raises(InvalidRequest, match=r"longer than 0\.5 s"):
        samples_of(wav(noise(RATE)), max_seconds=0.5)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(50, 90), st.integers(0, 9))
def test_pieces_cover_the_sound_and_are_short_enough(
    lengths: list[int], longest: int, seed: int
) -> None:
    unit = 320
    parts = [noise(length * unit, seed) * (number % 2) for number, length in enumerate(lengths)]
    samples = np.concatenate(parts)
    cuts = cuts_of(samples, longest=longest * unit, shortest=longest * unit * 2 // 3)
    assert cuts[0][0] == 0
    assert cuts[-1][1] == len(samples)
    assert all(end == start for (_, end), (start, _) in pairwise(cuts))
    assert all(0 < end - start <= longest * unit for start, end in cuts)


def test_a_long_sound_is_cut_where_nobody_speaks() -> None:
    samples = np.concatenate([noise(25 * RATE), np.zeros(RATE, np.int16), noise(10 * RATE)])
    [(_, cut), _] = cuts_of(samples, longest=30 * RATE, shortest=20 * RATE)
    assert 25 * RATE < cut < 26 * RATE


@pytest.mark.parametrize("bins", [80, 128])
def test_spectra_are_those_of_transformers(bins: int) -> None:
    from transformers import WhisperFeatureExtractor

    family = Whisper(FamilySetting(model_type="whisper", model={"num_mel_bins": bins}))
    assert isinstance(family, SoundFamily)
    samples = np.concatenate([noise(30_000), tone(1.0)])
    found = family.audio(samples).tensors["input_features"]
    extract = WhisperFeatureExtractor(feature_size=bins)
    expected = extract(samples / 32_768.0, sampling_rate=RATE, return_tensors="np")
    assert np.abs(found - expected.input_features[0]).max() < 1e-5


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    setting = FamilySetting(model_type="whisper", model={"max_source_positions": 100})
    limits = MediaLimits(max_audio_bytes=200_000, max_audio_seconds=6.0)
    one = Listener(setting, limits, num_copies=1, num_vectors=100)
    yield one
    one.close()


def test_a_listener_decodes_and_prepares(listener: Listener) -> None:
    async def heard() -> None:
        samples = np.concatenate([noise(RATE), np.zeros(RATE, np.int16), noise(RATE, 1)])
        async with listener.opened(wav(samples)) as recording:
            await check(recording, samples)

    async def check(recording: Recording, samples: np.ndarray) -> None:
        assert recording.samples == samples.astype("<i2").tobytes()
        assert recording.seconds == 3.0
        assert len(recording.cuts) == 2
        assert recording.end_of(0) == recording.start_of(1) < 2.0
        first, second = [await listener.piece(recording, index) for index in range(2)]
        assert first.digest != second.digest
        assert first.tensors["input_features"].shape == (80, 200)
        again = await listener.between(recording, 0.0, recording.end_of(0))
        assert again.digest == first.digest
        assert first.num_across == 100

    asyncio.run(heard())


async def opened(listener: Listener, data: bytes) -> None:
    async with listener.opened(data):
        pass


def test_long_recordings_together_have_a_limit(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "SHORT_S", 1.0)
    monkeypatch.setattr(listening, "LONGEST_AT_ONCE", 1)
    long, short = wav(noise(4 * RATE)), wav(noise(RATE // 2))

    async def both() -> None:
        async with listener.opened(long):
            with pytest.raises(Overloaded, match="send it again later"):
                await opened(listener, long)
            await opened(listener, short)
        await opened(listener, long)

    asyncio.run(both())


def test_a_listener_refuses_by_the_name_of_the_file(listener: Listener) -> None:
    for data, why in (
        (b"x" * 200_001, "at most 200000"),
        (b"x" * 100, "cannot be decoded"),
        (wav(noise(7 * RATE, 2), rate=RATE)[:199_999], "longer than 6 s"),
    ):
        if "longer" in why:
            data = wav(noise(40_000), rate=4000)
        with pytest.raises(InvalidRequest, match=f"file .*{why}") as caught:
            asyncio.run(opened(listener, data))
        assert caught.value.param == "file"
