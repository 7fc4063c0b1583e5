"""LoRA adapters in an engine: what peft says, whoever else is in the batch, and however adapters
come and go."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from sapwood import LLM
from sapwood.app.converting import merge_adapter
from sapwood.base.errors import ConfigError, InvalidRequest, NotFound
from sapwood.convert.writer import copy_side_files
from sapwood.frontends.serving.adapters import SENT
from sapwood.frontends.serving.generate import adapted
from sapwood.models.loader.weights import iterate_weights
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.model import ModelConfig
from sapwood.schema.logprobs import LogprobOptions
from sapwood.schema.request import RequestOptions, SentAdapter
from sapwood.schema.sampling import SamplingParams
from sapwood.store import ModelFiles, Silent
from sapwood.text.generation import TextRequest
from tests.adapters import OPTIONS, VOCABULARY, LogProbs, save_adapters
from tests.app.llms import llms_of
from tests.app.test_logprobs import Result
from tests.app.test_schedule_independence import kernels_here
from tests.app.test_windows import text
from tests.smollm2 import CONFIG
from tests.tiers import sweep
from tests.tiny import save_lfm2, save_llama, save_qwen3, save_qwen3_moe

NUM_OUTPUTS = 12
CLOSE = 1e-4


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def saved(
    model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Path], LogProbs]:
    return save_adapters(model_path, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def paths(saved: tuple[dict[str, Path], LogProbs]) -> dict[str, Path]:
    return saved[0]


@pytest.fixture(scope="module")
def reference(saved: tuple[dict[str, Path], LogProbs]) -> LogProbs:
    return saved[1]


@pytest.fixture
def make_llm(model_path: Path) -> Iterator[Callable[..., LLM]]:
    with llms_of(
        model_path,
        page_size=4,
        max_total_tokens=2048,
        max_running_requests=12,
        kernels=kernels_here()[0],
        enable_lora=True,
        max_lora_rank=16,
    ) as make:
        yield make


def named(paths: dict[str, Path]) -> str:
    return "\n".join(f"{name.replace(' ', '-')}={path}" for name, path in paths.items())


def ask(
    llm: LLM,
    prompts: Sequence[tuple[str, list[int]]],
    *,
    n: int = 1,
    prompt_start: int | None = None,
    **options: Any,
) -> list[Result]:
    """All at once, each (adapter, token ids); each of n samples is a result."""
    params = {"temperature": 0.0, "max_new_tokens": NUM_OUTPUTS, "ignore_eos": True, **options}

    async def one(index: int, adapter: str, prompt: list[int]) -> list[Result]:
        request = TextRequest(
            request_id=f"r{index}",
            prompt=prompt,
            options=RequestOptions(
                sampling=SamplingParams(**params),
                logprobs=LogprobOptions(prompt_start=prompt_start, num_top=0, token_ids=()),
                adapter=llm.services.adapter_of("", adapter.replace(" ", "-")),
            ),
            n=n,
        )
        found = [Result([]) for _ in range(n)]
        async with adapted(llm.services, [request]) as [own]:
            async for chunk in llm.services.generator.generate(own):
                assert chunk.finish is None or chunk.finish.kind != "error", chunk.finish
                found[chunk.index].chunks.append(chunk)
        return found

    async def every() -> list[Result]:
        each = await asyncio.gather(*(one(i, *prompt) for i, prompt in enumerate(prompts)))
        return [result for results in each for result in results]

    return llm.run(every())


def check(result: Result, adapter: str, prompt: list[int], reference: LogProbs) -> None:
    output = result.token_ids
    expected = reference(adapter, prompt + output)[len(prompt) - 1 : -1]
    told = torch.tensor(result.logprobs.of_tokens())
    assert (told - expected.gather(-1, torch.tensor(output)[:, None])[:, 0]).abs().max() < CLOSE
    assert expected.argmax(-1).tolist() == output


@sweep(strength=1, kernels=kernels_here(), depth=[1, 2], chunk=[5, -1])
def test_every_kind_of_adapter_and_the_base_in_one_batch(
    make_llm: Callable[..., LLM],
    paths: dict[str, Path],
    reference: LogProbs,
    kernels: str,
    depth: int,
    chunk: int,
) -> None:
    """Twice, so that the second time begins from hits; the same text for all, and others."""
    llm = make_llm(
        kernels=kernels,
        overlap_depth=depth,
        chunked_prefill_size=chunk,
        lora_paths=named(paths),
    )
    same = text(21, seed=1)
    asked = [(name, same) for name in ["", *paths]]
    asked += [(name, text(9 + i, seed=i)) for i, name in enumerate([*paths, ""])]
    for _ in range(2):
        for (adapter, prompt), result in zip(asked, ask(llm, asked), strict=True):
            check(result, adapter, prompt, reference)
    assert llm.stats().num_leased_pages == 0
    assert llm.stats().num_cached_tokens >= len(asked) * 8


EXPERTS = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]},
    "fused experts": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["v_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "outputs only": {
        "r": 3,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": [],
        "target_parameters": ["mlp.experts.down_proj"],
    },
}
CONVOLUTIONS = {
    "everything": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
    "projections": {"r": 2, "lora_alpha": 6, "target_modules": ["in_proj", "out_proj"]},
}


@sweep(strength=1, kernels=kernels_here(), depth=[1, 2])
@pytest.mark.parametrize(
    ("save", "options"),
    [(save_qwen3_moe, EXPERTS), (save_lfm2, CONVOLUTIONS), (save_llama, OPTIONS)],
    ids=["experts", "convolutions", "llama"],
)
def test_other_kinds_of_models(
    tmp_path: Path,
    make_llm: Callable[..., LLM],
    save: Callable[[Path], Path],
    options: dict[str, dict[str, Any]],
    kernels: str,
    depth: int,
) -> None:
    model_path = save(tmp_path / "model")
    paths, reference = save_adapters(model_path, tmp_path / "adapters", options)
    llm = make_llm(
        model=str(model_path), kernels=kernels, overlap_depth=depth, lora_paths=named(paths)
    )
    asked = [(name, text(9 + i, seed=i)) for i, name in enumerate(["", *paths, *paths, ""])]
    for (adapter, prompt), result in zip(asked, ask(llm, asked), strict=True):
        check(result, adapter, prompt, reference)


@sweep(strength=1, kernels=kernels_here(), depth=[1, 2], chunk=[5, -1], is_tied=[True, False])
def test_embeddings_and_output_layers(
    tmp_path: Path,
    make_llm: Callable[..., LLM],
    kernels: str,
    depth: int,
    chunk: int,
    is_tied: bool,
) -> None:
    """Of log probabilities of prompts, too: rows of logits that no token is sampled from. Where the
    output layer is the embedding, an adapter of one of them leaves the other as it is."""
    model_path = save_qwen3(tmp_path / "model", tie_word_embeddings=is_tied, hidden_size=64)
    paths, reference = save_adapters(model_path, tmp_path / "adapters", VOCABULARY)
    llm = make_llm(
        model=str(model_path),
        kernels=kernels,
        overlap_depth=depth,
        chunked_prefill_size=chunk,
        lora_paths=named(paths),
    )
    asked = [(name, text(9 + i, seed=i)) for i, name in enumerate(["", *paths])]
    for prompt_start in (None, 2):
        results = ask(llm, asked, prompt_start=prompt_start)
        for (adapter, prompt), result in zip(asked, results, strict=True):
            check(result, adapter, prompt, reference)
            if prompt_start is not None:
                expected = reference(adapter, prompt)[prompt_start:-1]
                targets = torch.tensor(prompt[prompt_start + 1 :])[:, None]
                told = torch.tensor(result.prompt.logprobs.of_tokens())
                assert (told - expected.gather(-1, targets)[:, 0]).abs().max() < CLOSE


def test_adapters_differ_and_share_no_prefix(
    make_llm: Callable[..., LLM], paths: dict[str, Path]
) -> None:
    llm = make_llm(lora_paths=named(paths))
    prompt = text(40, seed=3)
    first = ask(llm, [("", prompt)])
    others = ask(llm, [(name, prompt) for name in paths])
    assert first[0].chunks[-1].num_cached_tokens == 0
    assert all(result.chunks[-1].num_cached_tokens == 0 for result in others)
    (again,) = ask(llm, [("all", prompt)])
    assert again.chunks[-1].num_cached_tokens == 36
    assert len({tuple(result.token_ids) for result in [*first, *others]}) > 4


@pytest.mark.parametrize("overlaps", [False, True])
def test_more_adapters_than_run_at_once(
    make_llm: Callable[..., LLM], paths: dict[str, Path], reference: LogProbs, overlaps: bool
) -> None:
    """Requests are passed over until there is room for their adapters; slots change hands."""
    llm = make_llm(
        lora_paths=named(paths),
        max_loras_per_batch=4,
        max_loaded_loras=8,
        enable_lora_overlap_loading=overlaps,
        overlap_depth=2,
    )
    asked = [(name, text(7 + i, seed=i)) for i, name in enumerate([*paths, "", *paths])]
    for (adapter, prompt), result in zip(asked, ask(llm, asked), strict=True):
        check(result, adapter, prompt, reference)


def test_retraction(
    make_llm: Callable[..., LLM], paths: dict[str, Path], reference: LogProbs
) -> None:
    llm = make_llm(
        lora_paths=named(paths),
        max_total_tokens=160,
        schedule_conservativeness=0.0,
        context_length=96,
    )
    asked = [(name, text(20, seed=i)) for i, name in enumerate([*paths, ""])]
    results = ask(llm, asked, max_new_tokens=40)
    for (adapter, prompt), result in zip(asked, results, strict=True):
        check(result, adapter, prompt, reference)
    assert llm.stats().num_retractions > 0


def test_with_samples_grammars_and_guesses(
    make_llm: Callable[..., LLM], paths: dict[str, Path], reference: LogProbs
) -> None:
    llm = make_llm(
        lora_paths=named(paths), speculative_algorithm="NGRAM", disable_speculative_adaptation=True
    )
    prompt = text(6, seed=5) * 4
    for adapter in ("all", "patterns"):
        for result in ask(llm, [(adapter, prompt)], n=2):
            check(result, adapter, prompt, reference)
    words = llm.generate(prompt, {"regex": "(yes|no)", "max_new_tokens": 8}, lora_path="all")
    assert words[0].text in ("yes", "no")


def test_load_and_unload_while_serving(
    make_llm: Callable[..., LLM], paths: dict[str, Path], reference: LogProbs
) -> None:
    llm = make_llm()
    prompt = text(15, seed=6)
    with pytest.raises(NotFound, match="never loaded"):
        llm.generate(prompt, lora_path="all")
    llm.load_lora_adapter("all", paths["all"])
    (result,) = ask(llm, [("all", prompt)])
    check(result, "all", prompt, reference)
    with pytest.raises(InvalidRequest, match="loaded already"):
        llm.load_lora_adapter("all", paths["queries"])
    llm.unload_lora_adapter("all")
    with pytest.raises(NotFound, match="unloaded"):
        llm.generate(prompt, lora_path="all")
    llm.load_lora_adapter("all", paths["queries"])
    (result,) = ask(llm, [("all", prompt)])
    check(result, "queries", prompt, reference)
    assert result.chunks[-1].num_cached_tokens == 0, "a new load shares nothing with the old one"


def test_what_is_left_out_comes_back(
    make_llm: Callable[..., LLM], paths: dict[str, Path], reference: LogProbs
) -> None:
    llm = make_llm(max_loras_per_batch=2, max_loaded_loras=2)
    for name, path in paths.items():
        llm.load_lora_adapter(name.replace(" ", "-"), path)
    registry = llm.services.adapters
    assert registry is not None
    assert registry.loaded == ["a-regex", "without-keys"]
    prompt = text(11, seed=7)
    for name in paths:
        (result,) = ask(llm, [(name, prompt)])
        check(result, name, prompt, reference)
    assert len(registry.loaded) == 2


def test_ten_adapters_from_tensors_of_which_eight_are_kept(
    make_llm: Callable[..., LLM], paths: dict[str, Path], reference: LogProbs
) -> None:
    """SGLang's scenario of test_lora_load_from_tensor. Those that were left out come back."""
    llm = make_llm(max_loras_per_batch=8, max_loaded_loras=8)
    config = msgspec.json.decode((paths["patterns"] / "adapter_config.json").read_bytes())
    tensors = load_file(paths["patterns"] / "adapter_model.safetensors")
    for number in range(10):
        llm.load_lora_adapter_from_tensors(f"lora{number}", tensors, config)
    registry = llm.services.adapters
    assert registry is not None
    assert registry.loaded == [f"lora{number}" for number in range(2, 10)]
    prompt = text(13, seed=8)
    for name in ("lora9", "lora0"):
        (result,) = ask(llm, [(name, prompt)])
        check(result, "patterns", prompt, reference)
    assert registry.loaded == ["lora0", *(f"lora{number}" for number in range(3, 10))]
    llm.unload_lora_adapter("lora9")
    with pytest.raises(NotFound, match="lora9"):
        llm.generate(prompt, lora_path="lora9")
    llm.load_lora_adapter_from_tensors("lora9", tensors, config)
    (result,) = ask(llm, [("lora9", prompt)])
    check(result, "patterns", prompt, reference)
    other = {f"x.lora_{part}.weight": torch.ones(1, 1) for part in "AB"}
    with pytest.raises(InvalidRequest, match="model has no such"):
        llm.load_lora_adapter_from_tensors("other", other, config)


def test_pickled_tensors(
    make_llm: Callable[..., LLM], paths: dict[str, Path], reference: LogProbs
) -> None:
    llm = make_llm()
    registry = llm.services.adapters
    assert registry is not None
    config = (paths["patterns"] / "adapter_config.json").read_bytes()
    tensors = pickle.dumps(load_file(paths["patterns"] / "adapter_model.safetensors"))
    sent = SentAdapter(config=config, tensors=tensors, is_pickled=True)
    llm.run(registry.load("pickled", SENT, sent=sent))
    prompt = text(13, seed=8)
    (result,) = ask(llm, [("pickled", prompt)])
    check(result, "patterns", prompt, reference)
    evil = SentAdapter(config=config, tensors=pickle.dumps(print), is_pickled=True)
    with pytest.raises(InvalidRequest, match="must have a dict of tensors"):
        llm.run(registry.load("evil", SENT, sent=evil))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_lora_rank": 4}, "has rank"),
        ({"lora_target_modules": "q_proj v_proj"}, "--lora-target-modules leaves out"),
    ],
)
def test_what_the_options_do_not_allow_is_refused(
    make_llm: Callable[..., LLM], paths: dict[str, Path], options: dict[str, Any], message: str
) -> None:
    llm = make_llm(**options)
    with pytest.raises(InvalidRequest, match=message):
        llm.load_lora_adapter("patterns", paths["patterns"])
    llm.load_lora_adapter("queries", paths["queries"])
    assert llm.generate([1, 2, 3], {"max_new_tokens": 2}, lora_path="queries")[0].token_ids


def test_a_server_without_adapters_says_how_to_have_them(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(enable_lora=False, max_lora_rank=None)
    with pytest.raises(InvalidRequest, match="--enable-lora"):
        llm.generate("a", lora_path="mine")
    with pytest.raises(InvalidRequest, match="--enable-lora"):
        llm.load_lora_adapter("mine", "/nowhere")


def test_an_adapter_of_another_model_ends_the_start(
    make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    other = save_qwen3(tmp_path / "other", hidden_size=32)
    paths, _ = save_adapters(
        other, tmp_path / "adapters", {"it": {"r": 2, "target_modules": ["q_proj"]}}
    )
    with pytest.raises(ConfigError, match="is the adapter for another model"):
        make_llm(lora_paths=str(paths["it"]))


@pytest.mark.parametrize(
    ("save", "options"),
    [
        (save_llama, {"patterns": OPTIONS["patterns"]}),
        (lambda path: save_qwen3(path, tie_word_embeddings=True), VOCABULARY),
        (save_qwen3_moe, EXPERTS),
    ],
    ids=["llama", "vocabulary", "experts"],
)
def test_a_merged_adapter_is_the_adapter_on_its_base(
    tmp_path: Path, save: Callable[[Path], Path], options: dict[str, dict[str, Any]]
) -> None:
    """By the numbers of transformers, which loads the merged checkpoint."""
    from transformers import AutoModelForCausalLM

    model_path = save(tmp_path / "model")
    paths, reference = save_adapters(model_path, tmp_path / "adapters", options)
    prompt = text(14, seed=9)
    for name, path in paths.items():
        merged = merge_adapter(
            EngineConfig(model=ModelConfig(model=str(model_path))),
            str(path),
            tmp_path / "merged" / path.name,
            force=False,
            home=tmp_path / "home",
            progress=Silent(),
        )
        assert merged.num_layers > 0
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "merged" / path.name, dtype=torch.float32
        )
        with torch.inference_mode():
            found = model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
        assert (found - reference(name, prompt)).abs().max() < CLOSE, name


@pytest.mark.long
def test_smollm2(tmp_path: Path, make_llm: Callable[..., LLM], smollm2_files: ModelFiles) -> None:
    model_path = tmp_path / "model"
    weights = dict(iterate_weights(smollm2_files, dtype=torch.float32))
    LlamaForCausalLM.from_pretrained(None, config=CONFIG, state_dict=weights).save_pretrained(
        model_path
    )
    copy_side_files(smollm2_files.path, model_path)
    options = {
        "all": {**OPTIONS["all"], "r": 16},
        "patterns": OPTIONS["patterns"],
        "rslora": OPTIONS["rslora"],
        "both": VOCABULARY["both"],
        "saved both": VOCABULARY["saved both"],
    }
    paths, reference = save_adapters(model_path, tmp_path / "adapters", options, size=0.03)
    llm = make_llm(model=str(model_path), lora_paths=named(paths), page_size=16)
    asked = [(name, text(20 + i, seed=i)) for i, name in enumerate(["", *paths, ""])]
    for (adapter, prompt), result in zip(asked, ask(llm, asked), strict=True):
        check(result, adapter, prompt, reference)
