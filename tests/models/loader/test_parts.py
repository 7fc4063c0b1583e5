"""What one of several ranks reads of a checkpoint: its parts of the tensors, in any format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from sapwood.app.building.loading import Parts
from sapwood.app.building.model_defaults import read_json
from sapwood.distributed.groups import Group
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.build import Build, Groups
from sapwood.layers.quantization import SCHEMES
from sapwood.layers.quantization.formats import format_of
from sapwood.layers.quantization.formats.interface import CheckpointFormat
from sapwood.layers.quantization.gguf import CheckpointScheme
from sapwood.layers.targets import Target
from sapwood.models.lm.decoder import Decoder
from sapwood.models.loader import quantized
from sapwood.models.loader.weights import iterate_blocks, iterate_weights
from sapwood.models.registry import read_decoder
from sapwood.schema.stage import stages_of
from sapwood.store import ModelFiles
from sapwood.store.safetensors_header import read_safetensors_header
from tests.models.lm.peer import make_peer
from tests.models.lm.test_checkpoints import FIELDS, write
from tests.quantized_checkpoints import CASES as FORMATS
from tests.tiers import long_only

CPU = torch.device("cpu")
SIZE = 3
"""SmolLM2 has nine heads and three of keys."""


class NoPipe:
    def receive(self, num_rows: int) -> Tensor:
        raise AssertionError("nothing is computed here")

    def send(self, x: Tensor) -> None:
        raise AssertionError("nothing is computed here")


def model_of(files: ModelFiles, scheme: str, rank: int | None, stage: int | None = None) -> Decoder:
    """A rank's part of the model without weights, or a stage of it."""
    group = Group()
    if rank is not None:
        group = Group(rank=rank, size=SIZE, process_group=cast(Any, object()))
    config = read_decoder(read_json(files.path / "config.json")).for_context(64)
    build = Build(
        kernels=TorchKernels(),
        device=CPU,
        dtype=torch.float32,
        groups=Groups.tensor_parallel(group),
        scheme=SCHEMES.get(scheme)(),
    )
    if stage is None:
        return Decoder.of(config, build)
    return Decoder.of(config, build, stages_of(config.num_layers, SIZE)[stage], NoPipe())


def read(
    files: ModelFiles, targets: Mapping[str, Target], *, blocks: bool
) -> tuple[dict[str, Any], int]:
    """(the tensors that are read, bytes of the file)"""
    num_bytes: list[int] = []
    how: dict[str, Any] = {"dtype": torch.float32, "advance": num_bytes.append}
    parts = Parts(targets, str)
    iterate: Any = iterate_blocks if blocks else iterate_weights
    return dict(iterate(files, targets=parts, **how)), sum(num_bytes)


@pytest.mark.parametrize("blocks", [True, False])
def test_ranks_read_their_parts_of_a_gguf_file(smollm2_files: ModelFiles, blocks: bool) -> None:
    files = smollm2_files
    total = sum(path.stat().st_size for path in files.weights)
    every, _ = read(files, model_of(files, "gguf", None).targets(), blocks=blocks)
    # The second rank's parts begin and end within the tensors.
    targets = model_of(files, "gguf", 1).targets()
    found, num_bytes = read(files, targets, blocks=blocks)
    assert num_bytes <= 1.1 / SIZE * total
    assert found.keys() == every.keys() == targets.keys()
    num_cut = 0
    for name in [name for name in found if ".7." in name or "layers" not in name]:
        target, own = targets[name], found[name]
        assert tuple(own.shape) == target.part_shape
        expected = dense(every[name])
        if target.part is not None:
            num_cut += 1
            expected = target.part.of(expected)
        assert torch.equal(dense(own), expected), name
    assert num_cut == 8, "the embedding and a layer's seven matrices"


@pytest.mark.parametrize(
    "name",
    [
        "gptq 4, groups of 32",
        "gptq 4, act-order, zero points",
        "awq, groups of 32",
        "fp8 per output",
        "int8 rows",
        "w4a16, zero points",
        *long_only(
            "gptq 8, groups of 32, zero points", "fp8 per tensor", "modelopt nvfp4", "w8a16"
        ),
        *long_only("w4a16, act-order", "int8, zero points", "fp8 blocks, compressed", "nvfp4"),
    ],
)
def test_ranks_read_their_parts_of_a_quantised_file(name: str, tmp_path: Path) -> None:
    made = FORMATS[name]
    sizes = FIELDS | {"intermediate_size": 256, "num_key_value_heads": 4}
    peer = make_peer("llama", "LlamaForCausalLM", **sizes)
    files, _ = write(tmp_path, peer, made.config, lambda _: made.make)
    config = read_json(files.path / "config.json")
    form = format_of(config)
    assert form is not None
    every = dict(quantized.iterate(files, form, targets_of(config, form, Group())))
    # The second rank's parts begin within the tensors.
    targets = targets_of(config, form, Group(rank=1, size=2, process_group=cast(Any, object())))
    num_bytes: list[int] = []
    found = dict(quantized.iterate(files, form, targets, num_bytes.append))
    total = sum(entry.num_bytes for entry in read_safetensors_header(files.weights[0]))
    assert sum(num_bytes) <= 1.1 / 2 * total
    assert found.keys() == every.keys() == targets.keys()
    for weight, target in targets.items():
        expected = dense(every[weight])
        assert tuple(found[weight].shape) == target.part_shape
        if target.part is not None:
            expected = target.part.of(expected)
        assert torch.equal(dense(found[weight]), expected), weight


def targets_of(
    config: Mapping[str, Any], form: CheckpointFormat, group: Group
) -> Mapping[str, Target]:
    build = Build(
        kernels=TorchKernels(),
        device=CPU,
        dtype=torch.float32,
        groups=Groups.tensor_parallel(group),
        scheme=CheckpointScheme(form.name),
    )
    return Decoder.of(read_decoder(config), build).targets()


def dense(weight: Any) -> Tensor:
    found: Tensor = weight if isinstance(weight, Tensor) else weight.dequantized(torch.float32)
    return found


def test_stages_read_their_layers_of_a_gguf_file(smollm2_files: ModelFiles) -> None:
    total = sum(path.stat().st_size for path in smollm2_files.weights)
    models = [model_of(smollm2_files, "gguf", None, stage) for stage in range(SIZE)]
    num_bytes = []
    for model in models:
        read_bytes: list[int] = []
        weights = iterate_blocks(
            smollm2_files,
            dtype=torch.float32,
            advance=read_bytes.append,
            wanted=lambda name, model=model: not model.is_elsewhere(name),
        )
        assert {name for name, _ in weights} == model.targets().keys()
        num_bytes.append(sum(read_bytes))
    # The embedding, which the first stage and the last one need, is more than ten layers are.
    first, middle, last = num_bytes
    assert 3 * middle < 1.1 * total
    assert first == pytest.approx(last, rel=0.01)
    assert first + middle + last - (first - middle) <= total
