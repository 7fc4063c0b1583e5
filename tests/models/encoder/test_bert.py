"""Encoders against transformers, without an engine, on all kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import Any

import pytest
import torch
import transformers

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.build import Build
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.models.encoder.bert import Encoder
from sapwood.models.loader.assign import load_weights
from sapwood.models.registry import encoder_class

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 96,
    "bos_token_id": None,
    "eos_token_id": None,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {}),
    "relu": ("BertModel", {"hidden_act": "relu"}),
    "roberta": ("RobertaModel", {"pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRobertaModel", {"pad_token_id": 1, "type_vocab_size": 1}),
}
KERNELS = pytest.mark.parametrize(
    "kernels", [ReferenceKernels(), TorchKernels()], ids=lambda kernels: kernels.name
)


@cache
def peer_of(case: str) -> Any:
    architecture, fields = CASES[case]
    build = getattr(transformers, architecture)
    model = build(build.config_class(**SIZES, **fields)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "LayerNorm.weight" in name:
            parameter.data = 1.0 + 0.2 * noise
        else:
            parameter.data = noise * (0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5)
    return model


def encoder_of(model: Any, kernels: Kernels, *, rename: Callable[[str], str] = str) -> Encoder:
    hf_config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    build = Build(kernels=kernels, device=CPU, dtype=torch.float32)
    make = encoder_class(type(model).__name__)
    encoder = make(make.read(hf_config), build, num_labels=0)
    weights = {rename(name): tensor for name, tensor in model.state_dict().items()}
    report = load_weights(
        encoder, ((encoder.checkpoint_name(name), tensor) for name, tensor in weights.items())
    )
    assert all(name.startswith("pooler") for name in report.ignored)
    assert report.num_tensors == len(weights) - len(report.ignored)
    encoder.finalize()
    return encoder


def batch_of(texts: list[list[int]], types: list[list[int]] | None = None) -> ForwardBatch:
    lengths = tuple(map(len, texts))
    nothing = torch.zeros(0, dtype=torch.int64)
    return ForwardBatch(
        token_ids=torch.tensor([token for text in texts for token in text]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        write_index=nothing,
        attention=AttentionBatch(
            page_table=torch.zeros(len(texts), 1, dtype=torch.int32),
            query_start=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            context_len=torch.tensor(lengths, dtype=torch.int32),
            query_lens=lengths,
            context_lens=lengths,
            num_decodes=0,
        ),
        kv_caches=[],
        logits_index=nothing,
        token_types=None
        if types is None
        else torch.tensor([kind for text in types for kind in text]),
    )


def random_texts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 131, (length,), generator=generator).tolist() for length in lengths]


@KERNELS
@pytest.mark.parametrize("lengths", [(7,), (9, 9, 9), (5, 1, 33, 5, 80), (1, 1)])
@pytest.mark.parametrize("case", CASES)
def test_hidden_states_equal_transformers(
    kernels: Kernels, case: str, lengths: tuple[int, ...]
) -> None:
    model = peer_of(case)
    texts = random_texts(*lengths)
    got = encoder_of(model, kernels).hidden(batch_of(texts)).split(lengths)
    for text, hidden in zip(texts, got, strict=True):
        want = model(torch.tensor([text])).last_hidden_state[0]
        torch.testing.assert_close(hidden, want, atol=2e-5, rtol=0)


@KERNELS
def test_token_types_equal_transformers(kernels: Kernels) -> None:
    model = peer_of("bert")
    texts, types = random_texts(6, 4), [[0, 0, 1, 1, 1, 1], [0, 0, 0, 1]]
    got = encoder_of(model, kernels).hidden(batch_of(texts, types)).split([6, 4])
    for text, kinds, hidden in zip(texts, types, got, strict=True):
        out = model(torch.tensor([text]), token_type_ids=torch.tensor([kinds]))
        torch.testing.assert_close(hidden, out.last_hidden_state[0], atol=2e-5, rtol=0)


def test_a_text_does_not_depend_on_the_others() -> None:
    encoder = encoder_of(peer_of("bert"), TorchKernels())
    first, second, third = random_texts(20, 7, 20)
    together = encoder.hidden(batch_of([first, second, third]))[:20]
    torch.testing.assert_close(together, encoder.hidden(batch_of([first])), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"bert.{name}",
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ),
    ],
    ids=["with a head's prefix", "of the first BERT"],
)
def test_other_names_of_the_same_tensors(rename: Callable[[str], str]) -> None:
    model = peer_of("bert")
    batch = batch_of(random_texts(9))
    plain = encoder_of(model, TorchKernels()).hidden(batch)
    renamed = encoder_of(model, TorchKernels(), rename=rename).hidden(batch)
    assert torch.equal(plain, renamed)


def test_the_parameters_are_all_counted() -> None:
    model = peer_of("bert")
    counted = encoder_of(model, TorchKernels()).config.num_parameters
    matrices = [one for name, one in model.named_parameters() if not name.startswith("pooler")]
    assert counted == sum(one.numel() for one in matrices if one.dim() == 2)
