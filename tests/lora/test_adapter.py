"""From PEFT's tensors to additions: names, shapes, fused layers, ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.distributed.groups import Group
from sapwood.kernels.large_pages import LARGE_PAGE_BYTES
from sapwood.kernels.low_rank import AdapterRows, LowRank
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.adapters import AdapterContext, StepAdapters
from sapwood.layers.build import Build, Groups
from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.linear import Arrangement, ColumnParallelLinear, RowParallelLinear, even_part
from sapwood.layers.targets import prefixed
from sapwood.lora.adapter import AdaptableModel, adaptable, build_adapter
from sapwood.lora.config import AdapterConfig
from sapwood.lora.tensors import read_tensors

IN, OUT = 6, 8
CONFIG = AdapterConfig(r=2, lora_alpha=4.0)
NAMES = ("q_proj", "k_proj")


def build(context: AdapterContext, group: Group | None = None) -> Build:
    return Build(
        kernels=TorchKernels(),
        device=torch.device("cpu"),
        dtype=torch.float32,
        groups=Groups.tensor_parallel(group or Group()),
        adapters=context,
    )


def tensors(*names: str, rank: int = 2, in_size: int = IN, out: int = OUT) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name in names:
        path = f"base_model.model.{name}"
        found[f"{path}.lora_A.weight"] = torch.randn(rank, in_size, generator=generator)
        found[f"{path}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    return found


def layer_of(context: AdapterContext) -> ColumnParallelLinear:
    parts = tuple(even_part(name, OUT, Group()) for name in NAMES)
    return ColumnParallelLinear(build(context), IN, parts, bias=False)


def model_of(layer: ColumnParallelLinear | RowParallelLinear) -> AdaptableModel:
    return adaptable(layer.targets(), str, torch.float32)


def every_row(count: int) -> StepAdapters:
    rows = AdapterRows(slots=(0,), starts=(0, count), rows=torch.arange(count))
    return StepAdapters(rows=rows, selected=rows)


def added(
    context: AdapterContext, layer: ColumnParallelLinear, found: dict[str, Tensor], x: Tensor
) -> Tensor:
    """What the adapter adds to the layer, whose weight is 0."""
    for target in layer.targets().values():
        target.place(torch.zeros(target.shape))
    layer.linear.pack()
    adapter = build_adapter(found, CONFIG, model_of(layer), source="it", max_rank=8)
    for site, addition in adapter.additions.items():
        site.place(0, addition)
    with context.of(every_row(len(x))):
        return layer(x)


def expected(found: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    path = f"base_model.model.{name}"
    scale = CONFIG.lora_alpha / found[f"{path}.lora_A.weight"].shape[0]
    return scale * (x @ found[f"{path}.lora_A.weight"].T) @ found[f"{path}.lora_B.weight"].T


def test_parts_of_a_fused_layer() -> None:
    context, x = AdapterContext(), torch.randn(5, IN)
    found = tensors("k_proj")
    out = added(context, layer_of(context), found, x)
    torch.testing.assert_close(out[:, OUT:], expected(found, "k_proj", x))
    assert out[:, :OUT].abs().sum() == 0


def test_a_checkpoint_with_one_tensor_for_all_parts() -> None:
    context, x = AdapterContext(), torch.randn(5, IN)
    parts = tuple(even_part(name, OUT, Group()) for name in NAMES)
    rows = (torch.arange(0, 2 * OUT, 2), torch.arange(1, 2 * OUT, 2))
    layer = ColumnParallelLinear(
        build(context), IN, parts, bias=False, arrangement=Arrangement(rows=rows, fused="qk")
    )
    found = tensors("qk", out=2 * OUT)
    out = added(context, layer, found, x)
    torch.testing.assert_close(out, expected(found, "qk", x)[:, torch.cat(rows)])


def test_over_two_ranks() -> None:
    x = torch.randn(5, IN)
    found = {**tensors("q_proj"), **tensors("o_proj", in_size=OUT, out=IN)}

    total = torch.zeros(len(x), IN)
    for rank in range(2):
        context = AdapterContext()
        group = _Unsummed(rank=rank, size=2, process_group=object())  # type: ignore[arg-type]
        made = build(context, group)
        first = ColumnParallelLinear(made, IN, (even_part("q_proj", OUT, group),), bias=False)
        second = RowParallelLinear(made, "o_proj", OUT, IN, bias=False, group=group)
        targets = first.targets() | second.targets()
        for layer in (first, second):
            for target in layer.targets().values():
                target.place(torch.zeros(target.shape))
            layer.linear.pack()
        model = adaptable(targets, str, torch.float32)
        adapter = build_adapter(found, CONFIG, model, source="it", max_rank=8)
        for site, addition in adapter.additions.items():
            site.place(0, addition)
        with context.of(every_row(len(x))):
            total += second(first(x))
    torch.testing.assert_close(total, expected(found, "o_proj", expected(found, "q_proj", x)))


class _Unsummed(Group):
    """A rank whose partial sums the test adds up."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (tensors("v_proj"), "an adapter of v_proj, but the model has no such"),
        (tensors("q_proj", rank=9), "has rank 9 at q_proj, more than --max-lora-rank 8"),
        (tensors("q_proj", in_size=5), "for 5 inputs and 8 outputs, but the model's layer has 6"),
        ({"base_model.model.q_proj.lora_A.weight": torch.ones(2, IN)}, "without its lora_B"),
        ({"base_model.model.q_proj.lora_B.weight": torch.ones(2, IN)}, "without its lora_A"),
        ({"base_model.model.embed.lora_embedding_A": torch.ones(2, 2)}, "its lora_embedding_B"),
        (
            {"e.lora_embedding_A": torch.ones(2, 2), "e.lora_embedding_B": torch.ones(2, 2)},
            "has no such embedding",
        ),
        ({"model.norm.weight": torch.ones(2)}, "must be a matrix of floats"),
        ({"model.gate.weight": torch.ones(2, 2)}, "a whole weight of model.gate; of modules_to"),
        ({"q_proj.lora_magnitude_vector": torch.ones(2, 1)}, "which no LoRA adapter has"),
        ({}, "has no tensors"),
        (
            {
                "q_proj.lora_A.weight": torch.ones(2, IN, dtype=torch.int8),
                "q_proj.lora_B.weight": torch.ones(OUT, 2),
            },
            "must be a matrix of floats",
        ),
        (
            {
                "q_proj.lora_A.weight": torch.ones(3, IN),
                "q_proj.lora_B.weight": torch.ones(OUT, 2),
            },
            "but q_proj.lora_B.weight is",
        ),
    ],
)
def test_what_does_not_fit_is_refused(found: dict[str, Tensor], message: str) -> None:
    model = model_of(layer_of(AdapterContext()))
    with pytest.raises(ConfigError, match=message):
        build_adapter(found, CONFIG, model, source="it", max_rank=8)


def test_modules_that_are_left_out() -> None:
    model = model_of(layer_of(AdapterContext()))
    only = frozenset({"k_proj"})
    build_adapter(tensors("k_proj"), CONFIG, model, source="it", max_rank=8, modules=only)
    with pytest.raises(ConfigError, match="--lora-target-modules leaves out"):
        build_adapter(tensors("q_proj"), CONFIG, model, source="it", max_rank=8, modules=only)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has neither"):
        read_tensors(tmp_path)
    torch.save(tensors("q_proj"), tmp_path / "adapter_model.bin")
    assert read_tensors(tmp_path).keys() == tensors("q_proj").keys()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no such file")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tensors(tmp_path)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("true",)


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"a": _Evil()}, tmp_path / "adapter_model.bin")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("found", "is_covered"),
    [
        (tensors("q_proj", "lm_head"), True),
        ({**tensors("q_proj"), "base_model.model.embed_tokens.weight": torch.ones(OUT, IN)}, True),
        ({"base_model.model.lm_head.weight": torch.ones(OUT, IN)}, False),
    ],
)
def test_what_recorded_steps_have(found: dict[str, Tensor], is_covered: bool) -> None:
    context = AdapterContext()
    head = LMHead(build(context), OUT, IN, tied=None)
    embedding = VocabEmbedding(build(context), OUT, IN)
    targets = {
        **layer_of(context).targets(),
        **prefixed("embed_tokens", embedding.targets()),
        **prefixed("lm_head", head.adapter_targets()),
    }
    model = adaptable(targets, str, torch.float32)
    adapter = build_adapter(found, CONFIG, model, source="it", max_rank=8)
    assert adapter.is_covered == is_covered


@pytest.mark.parametrize("rank", [2, 512])
def test_the_numbers_of_a_large_adapter_lie_together(rank: int) -> None:
    size = 1024
    layers = {
        name: ColumnParallelLinear(
            build(AdapterContext()), size, (even_part(name, size, Group()),), bias=False
        )
        for name in NAMES
    }
    targets = {path: one for layer in layers.values() for path, one in layer.targets().items()}
    found = tensors(*NAMES, rank=rank, in_size=size, out=size)
    config = AdapterConfig(r=rank, lora_alpha=rank)
    adapter = build_adapter(
        found, config, adaptable(targets, str, torch.float32), source="it", max_rank=512
    )
    places = []
    for name, addition in zip(NAMES, adapter.additions.values(), strict=True):
        assert isinstance(addition, LowRank)
        (part,) = addition.parts
        assert torch.equal(addition.a, found[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(part.b.t(), found[f"base_model.model.{name}.lora_B.weight"])
        places += [addition.a.data_ptr(), part.b.data_ptr()]
    if rank == 512:
        first = places[0]
        assert first % LARGE_PAGE_BYTES == 0
        assert places == [first + index * rank * size * 4 for index in range(4)]
