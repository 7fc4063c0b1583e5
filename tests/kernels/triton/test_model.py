"""A whole decoder on the Triton kernels: greedy tokens as the reference's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sapwood.kernels.interface import Kernels
from sapwood.kernels.kv_cache import KV_CACHE_DTYPES
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.triton.ops import TritonKernels
from sapwood.layers.build import Build
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.quantization.dense import DENSE
from sapwood.layers.quantization.interface import LinearScheme
from sapwood.layers.quantization.on_the_fly import CodesScheme, Int8Scheme
from sapwood.memory.buffers import allocate_caches
from sapwood.models.lm.decoder import Decoder
from sapwood.models.loader.assign import load_weights
from sapwood.models.registry import read_decoder
from tests.models.lm.harness import NewTokens, make_batch
from tests.tiny import save_qwen3

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy

PROMPTS = {"long": [5, 80, 200, 31, 7, 7, 120], "short": [44, 9]}
PAGES = {"long": [3, 1, 6, 2], "short": [5, 4, 7]}
PAGE_SIZE = 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("qwen3"))


def to_device(batch: ForwardBatch, device: torch.device) -> ForwardBatch:
    attention = replace(
        batch.attention,
        page_table=batch.attention.page_table.to(device),
        query_start=batch.attention.query_start.to(device),
        context_len=batch.attention.context_len.to(device),
    )
    return replace(
        batch,
        token_ids=batch.token_ids.to(device),
        positions=batch.positions.to(device),
        write_index=batch.write_index.to(device),
        logits_index=batch.logits_index.to(device),
        attention=attention,
    )


def loaded(
    directory: Path, kernels: Kernels, device: torch.device, scheme: LinearScheme, kv_name: str
) -> tuple[Decoder, list[tuple[Tensor, ...]]]:
    """The model, and its caches of 8 pages."""
    config = read_decoder(json.loads((directory / "config.json").read_text()))
    build = Build(kernels=kernels, device=device, dtype=torch.float32, scheme=scheme)
    model = Decoder.of(config, build)
    weights: dict[str, Tensor] = load_file(directory / "model.safetensors")
    load_weights(model, weights.items())
    model.finalize()
    groups = [group.with_dtypes(kv=kv_name, activations="float32") for group in config.cache_groups]
    return model, allocate_caches(groups, [8], page_size=PAGE_SIZE, device=device)


def greedy_tokens(
    directory: Path,
    kernels: Kernels,
    device: torch.device,
    scheme: LinearScheme,
    num_steps: int,
    kv_dtype: torch.dtype,
) -> list[list[int]]:
    """Both prompts in one step, then both decode together; the tokens of each step."""
    (name,) = [name for name, dtype in KV_CACHE_DTYPES.items() if dtype == kv_dtype]
    model, caches = loaded(directory, kernels, device, scheme, name)
    new: list[Sequence[int]] = list(PROMPTS.values())
    computed = [0, 0]
    chosen: list[list[int]] = []
    for _ in range(num_steps):
        requests = [
            NewTokens(tokens, done, pages)
            for tokens, done, pages in zip(new, computed, PAGES.values(), strict=True)
        ]
        batch = make_batch(requests, caches)
        last = torch.tensor([len(tokens) for tokens in new]).cumsum(0) - 1
        batch = replace(to_device(batch, device), logits_index=last.to(device))
        chosen.append(kernels.argmax(model.compute(batch)).tolist())
        computed = [done + len(tokens) for done, tokens in zip(computed, new, strict=True)]
        new = [[token] for token in chosen[-1]]
    return chosen


@pytest.mark.parametrize(
    ("scheme", "num_steps", "kv_dtype"),
    [
        (DENSE, 3, torch.float32),
        pytest.param(DENSE, 6, torch.float32, marks=pytest.mark.long),
        (Int8Scheme(), 2, torch.float32),
        (CodesScheme("fp8"), 2, torch.int8),
    ],
    ids=["dense", "dense, more steps", "int8", "fp8 and 8-bit KV"],
)
def test_greedy_tokens_are_the_references(
    device: torch.device,
    directory: Path,
    scheme: LinearScheme,
    num_steps: int,
    kv_dtype: torch.dtype,
) -> None:
    found = []
    with torch.inference_mode():
        for kernels, there in (
            (ReferenceKernels(), torch.device("cpu")),
            (TritonKernels(), device),
        ):
            found.append(greedy_tokens(directory, kernels, there, scheme, num_steps, kv_dtype))
    assert found[0] == found[1]
    assert len({token for step in found[0] for token in step}) > 1


def test_logits_depend_on_the_request_alone(device: torch.device, directory: Path) -> None:
    """As with --enable-deterministic-inference: whole prompts together, the same ones in pieces,
    each alone, and token by token."""
    kernels = TritonKernels()
    kernels.set_exact_products(True)
    model, caches = loaded(directory, kernels, device, DENSE, "int8")

    def logits(*requests: NewTokens) -> list[Tensor]:
        batch = to_device(make_batch(requests, caches), device)
        found = model.compute(batch)
        return list(found.split([len(request.token_ids) for request in requests]))

    with torch.inference_mode():
        whole = logits(*(NewTokens(PROMPTS[name], 0, PAGES[name]) for name in PROMPTS))
        tokens, pages = PROMPTS["long"], PAGES["long"]
        for cuts in ((0, 3, 7), (0, 5, 6, 7), tuple(range(8))):
            pieces = [
                logits(NewTokens(tokens[begin:end], begin, pages))[0]
                for begin, end in pairwise(cuts)
            ]
            assert torch.equal(torch.cat(pieces), whole[0]), cuts
        decode = NewTokens(tokens[6:], 6, pages)
        beside = logits(decode, NewTokens(PROMPTS["short"], 0, PAGES["short"]))
        assert torch.equal(beside[0], whole[0][6:])
        assert torch.equal(beside[1], whole[1])
