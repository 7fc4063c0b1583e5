"""Small tokenizers of every kind that models use, built in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from sapwood.text.tokenizer import Tokenizer

CORPUS = [
    "Hello world, how are you today? I'm fine, thanks! Numbers 1234 and code: x = y + 1;\n",
    "Les élèves ont mangé à midi. Größe und Straße. Привет, мир. 你好,世界。こんにちは 😀👍🏽\n",
    "The quick brown fox jumps over the lazy dog. <html> & \"quotes\" 'single' \t tabs\n",
] * 20


def byte_level() -> Backend:
    """As GPT-2, Llama 3 and Qwen have it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    # Two tokens outside the byte alphabet, and one whose "é" would be a byte of its own.
    backend.add_tokens(["<tool_call>", "two words", "été"])
    return backend


def byte_fallback(*, strip: bool) -> Backend:
    """As Llama 2 has it (strip), and Gemma (no strip)."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for token in ["▁", "▁▁", "▁Hello", "▁world", *"abcdeHlorw,.!", "é", "你", "\n", "▁b", "x▁y"]:
        vocabulary[token] = len(vocabulary)
    backend = Backend(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        if strip
        else [normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def metaspace(*, scheme: str) -> Backend:
    """As T5 and XLM-R have it."""
    pieces = ["▁", "▁▁", "▁Hello", "▁world", *"abcdeHlorw,.!", "é", "x▁y", "▁b", "you"]
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), *((piece, -2.0) for piece in pieces)]
    backend = Backend(models.Unigram(vocabulary, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.add_special_tokens(["<s>"])
    return backend


def word_piece() -> Backend:
    tokens = [
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "hello",
        "world",
        "##s",
        "##ing",
        "a",
        "##b",
        ".",
        "don",
        "'",
    ]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[CLS]", "[SEP]"])
    return backend


def word_level() -> Backend:
    """With no decoder at all: tokens are joined by spaces."""
    tokens = ["<unk>", "<s>", "</s>", "one", "two", "three", "é"]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def word_suffix() -> Backend:
    """As the first GPT and CLIP have it; a token's text depends on whether one follows."""
    tokens = ["<unk>", "<s>", "a", "b</w>", "hello</w>", "wor", "ld</w>", "é</w>"]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    backend.add_special_tokens(["<s>"])
    return backend


BUILDERS: dict[str, Callable[[], Backend]] = {
    "byte_level": byte_level,
    "llama_2": lambda: byte_fallback(strip=True),
    "gemma": lambda: byte_fallback(strip=False),
    "metaspace": lambda: metaspace(scheme="always"),
    "metaspace_never": lambda: metaspace(scheme="never"),
    "word_piece": word_piece,
    "word_level": word_level,
    "word_suffix": word_suffix,
}


@pytest.fixture(scope="session")
def backends() -> dict[str, Callable[[], Backend]]:
    """Name -> a fresh backend of that kind."""
    return BUILDERS


@pytest.fixture(scope="session", params=sorted(BUILDERS))
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(BUILDERS[request.param]())


@pytest.fixture(scope="session")
def byte_level_tokenizer() -> Tokenizer:
    return Tokenizer(
        byte_level(), special_tokens={"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    )


@pytest.fixture(scope="session")
def llama_2_tokenizer() -> Tokenizer:
    return Tokenizer(
        byte_fallback(strip=True), special_tokens={"bos_token": "<s>", "eos_token": "</s>"}
    )


@pytest.fixture(scope="session")
def smollm2_directory(request: pytest.FixtureRequest) -> Path:
    """The directory with a real model's tokenizer.json, where the machine has one."""
    try:
        files = request.getfixturevalue("smollm2_files")
    except pytest.FixtureLookupError:
        pytest.skip("no fixture smollm2_files: the model's files are not on this machine")
    return Path(files.path)


@pytest.fixture(scope="session")
def bos_processor() -> Callable[[Backend, str], processors.TemplateProcessing]:
    """A post-processor that puts a BOS before the text."""

    def build(backend: Backend, bos: str) -> processors.TemplateProcessing:
        special = [(bos, backend.token_to_id(bos))]
        return processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)

    return build
