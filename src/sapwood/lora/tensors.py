"""The tensors of an adapter, by what they are: PEFT's names.

Source: the format of PEFT 0.21 (adapter_model.safetensors)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.lora.pickled import read_pickle

_PREFIXES = ("base_model.model.", "base_model.")
_LINEAR = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
_OWN_WEIGHT, _BASE_WEIGHT = ".weight", ".base_layer.weight"
_SAFETENSORS, _PICKLED = "adapter_model.safetensors", "adapter_model.bin"

Pairs = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterTensors:
    """An adapter's tensors by the path of their layer.

    linear      A [rank, in], B [out, rank]
    embeddings  A [rank, vocab], B [hidden, rank]
    wholes      [vocab, hidden]: weights that PEFT's modules_to_save trained instead of the model's
    """

    linear: Pairs
    embeddings: Pairs
    wholes: Mapping[str, Tensor]


def content_of(tensors: Mapping[str, Tensor], config: object) -> str:
    """A digest of all that an adapter is: its tensors and its configuration."""
    told = hashlib.sha256(repr(config).encode("utf-8", "surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        told.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode("utf-8", "replace"))
        told.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return told.hexdigest()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the adapter in a folder, on the host.

    Raises ConfigError if they are not there or cannot be read."""
    safe, pickled = folder / _SAFETENSORS, folder / _PICKLED
    try:
        if safe.is_file():
            return load_file(safe)
        if pickled.is_file():
            found = torch.load(pickled, map_location="cpu", weights_only=True)
            return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    except (
        OSError, SafetensorError, UnpicklingError, RuntimeError, ValueError, AttributeError
    ) as error:  # fmt: skip
        raise ConfigError(f"{folder}: the adapter's tensors cannot be read: {error}") from error
    raise ConfigError(f"{folder} has neither {_SAFETENSORS} nor {_PICKLED}")


def parse_tensors(data: bytes, source: str, *, is_pickled: bool) -> dict[str, Tensor]:
    """The tensors in these bytes, on the host; `source` names the adapter in errors.

    is_pickled  whether they are a pickle of a dict of tensors; else they are in the safetensors
                format
    Raises      ConfigError for anything else
    """
    if is_pickled:
        return read_pickle(data, source)
    try:
        return load(data)
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{source}: the tensors cannot be read as safetensors: {error}"
        ) from error


def sorted_tensors(tensors: Mapping[str, Tensor], source: str) -> AdapterTensors:
    """The tensors by what they are; `source` names the adapter in errors.

    PEFT saves the model's own weight beside the adapter of an embedding or output layer. It is the
    weight that the server has, and left out here.
    Raises ConfigError for a tensor of another kind, or of numbers that no adapter has
    """
    plain = {_without_prefix(name): name for name in tensors}
    if len(plain) < len(tensors):
        raise ConfigError(f"{source} has two tensors for the same layer")
    if not tensors:
        raise ConfigError(f"{source} has no tensors")
    linear: dict[str, tuple[Tensor, Tensor]] = {}
    embeddings: dict[str, tuple[Tensor, Tensor]] = {}
    wholes: dict[str, Tensor] = {}
    for name, original in plain.items():
        tensor = tensors[original]
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise ConfigError(
                f"{source}: {original} must be a matrix of floats, but is {list(tensor.shape)} "
                f"{tensor.dtype}; biases and other vectors are not served"
            )
        for (first, second), found in ((_LINEAR, linear), (_EMBEDDING, embeddings)):
            if name.endswith(second):
                if name[: -len(second)] + first not in plain:
                    raise ConfigError(f"{source} has {original} without its {first.strip('.')}")
                break
            if name.endswith(first):
                path = name[: -len(first)]
                found[path] = _pair(tensors, original, plain.get(path + second), second, source)
                break
        else:
            if not name.endswith(_OWN_WEIGHT):
                raise ConfigError(f"{source} has the tensor {original}, which no LoRA adapter has")
            wholes[name] = tensor
    return AdapterTensors(
        linear=linear,
        embeddings=embeddings,
        wholes={
            name.removesuffix(_OWN_WEIGHT): tensor
            for name, tensor in wholes.items()
            if name.removesuffix(_BASE_WEIGHT) not in (linear.keys() | embeddings.keys())
        },
    )


def _without_prefix(name: str) -> str:
    return next((name[len(p) :] for p in _PREFIXES if name.startswith(p)), name)


def _pair(
    tensors: Mapping[str, Tensor], name: str, other: str | None, kind: str, source: str
) -> tuple[Tensor, Tensor]:
    if other is None:
        raise ConfigError(f"{source} has {name} without its {kind.strip('.')}")
    a, b = tensors[name], tensors[other]
    if b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] < 1:
        raise ConfigError(f"{source}: {name} is {list(a.shape)}, but {other} is {list(b.shape)}")
    return a, b
