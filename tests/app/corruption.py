"""Ways in which a checkpoint arrives broken: each makes new contents of one file, or takes it away.

A corruption says whether it can be seen in the file alone. What cannot (a bit of a weight, of a
tokenizer's text, of a number that stays plausible) is for checksums to find.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Corruption:
    """what: in words; content: the file's new bytes, None: it is gone; visible: must be refused"""

    what: str
    file: str
    content: bytes | None
    visible: bool = True


Corrupt = Callable[[Path, random.Random], Corruption]


# ---- any file ------------------------------------------------------------------------------------


def truncated(path: Path, rng: random.Random) -> Corruption:
    data = path.read_bytes()
    size = rng.randrange(len(data))
    return Corruption(f"truncated to {size} of {len(data)} bytes", path.name, data[:size])


def lengthened(path: Path, rng: random.Random) -> Corruption:
    more = rng.randbytes(rng.choice([33, 100, 4096]))
    return Corruption(f"{len(more)} bytes more", path.name, path.read_bytes() + more)


def gone(path: Path, rng: random.Random) -> Corruption:
    return Corruption("gone", path.name, None)


def flipped(path: Path, first: int, end: int, rng: random.Random, *, visible: bool) -> Corruption:
    data = bytearray(path.read_bytes())
    position, bit = rng.randrange(first, end), rng.randrange(8)
    data[position] ^= 1 << bit
    what = f"bit {bit} of byte {position} flipped"
    return Corruption(what, path.name, bytes(data), visible)


# ---- safetensors ---------------------------------------------------------------------------------


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _with_header(header: str, tensors: bytes) -> bytes:
    raw = header.encode()
    return len(raw).to_bytes(8, "little") + raw + tensors


def safetensors_header_bit(path: Path, rng: random.Random) -> Corruption:
    end = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return flipped(path, 0, end, rng, visible=False)


def safetensors_data_bit(path: Path, rng: random.Random) -> Corruption:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return flipped(path, start, len(data), rng, visible=False)


def safetensors_header_length(path: Path, rng: random.Random) -> Corruption:
    data = path.read_bytes()
    length = rng.choice([0, 1, 7, len(data), 10**8, 2**31, 2**40, 2**63 - 1, 2**64 - 1])
    return Corruption(f"header length {length}", path.name, struct.pack("<Q", length) + data[8:])


def safetensors_table(path: Path, rng: random.Random) -> Corruption:
    """One tensor's line of the header is wrong."""
    header, tensors = _header(path)
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.sample(names, 2)
    entry = header[name]
    begin, end = entry["data_offsets"]
    change = rng.choice(
        [
            {"dtype": rng.choice(["F16", "BF16", "F64", "I8", "BOOL", "F4"])},
            {"dtype": rng.choice(["I32", "U32"])},  # of the same size, but no numbers for a weight
            {"dtype": rng.choice(["F33", "", 5, None, "f32"])},
            {"shape": [*entry["shape"], 2]},
            {"shape": [size + 1 for size in entry["shape"]]},
            {"shape": rng.choice([[-1], [2**63], [1.5], "x", None, [True], [[1]]])},
            {"shape": [*entry["shape"], 1]},
            {"data_offsets": header[other]["data_offsets"]},
            {"data_offsets": [begin, end + 4]},
            {"data_offsets": [end, begin]},
            {"data_offsets": [begin + 4, end + 4]},
            {"data_offsets": rng.choice([[-4, 0], [0], [2**64, 2**64], None, [0.0, 4.0]])},
            {"extra": 1},
        ]
    )
    header[name] = {**entry, **change}
    return Corruption(f"{name}: {change}", path.name, _with_header(json.dumps(header), tensors))


def safetensors_names(path: Path, rng: random.Random) -> Corruption:
    header, tensors = _header(path)
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.sample(names, 2)
    text = json.dumps(header)
    kind = rng.choice(["twice", "renamed", "left out"])
    if kind == "twice":
        text = text.replace(json.dumps(name), json.dumps(other))
    elif kind == "renamed":
        text = text.replace(json.dumps(name), json.dumps(name + "x"))
    else:
        text = json.dumps({key: value for key, value in header.items() if key != name})
    return Corruption(f"{name} {kind}", path.name, _with_header(text, tensors))


def safetensors_nonsense(path: Path, rng: random.Random) -> Corruption:
    _, tensors = _header(path)
    header = rng.choice(["[]", "null", "{", "[" * 20_000, '{"a":' * 20_000, "{}", '{"a": {}}'])
    return Corruption(f"header {header[:10]}", path.name, _with_header(header, tensors))


# ---- the index of shards -------------------------------------------------------------------------


def index_table(path: Path, rng: random.Random) -> Corruption:
    index = json.loads(path.read_text())
    table = index["weight_map"]
    name = rng.choice(list(table))
    shards = sorted(set(table.values()))
    changed: Any = rng.choice(
        [
            {**table, name: next(shard for shard in shards if shard != table[name])},
            {**table, name: "model-00009-of-00002.safetensors"},
            {**table, name: "../../../../etc/passwd"},
            {**table, name: rng.choice(["", "..", 5, None, ["x"]])},
            {**table, "model.unknown.weight": shards[0]},
            rng.choice([{}, [], None, "x"]),
        ]
    )
    content = json.dumps({**index, "weight_map": changed}).encode()
    return Corruption(f"index, {name}", path.name, content)


def swapped(path: Path, other: Path) -> Corruption:
    return Corruption(f"the contents of {other.name}", path.name, other.read_bytes())


# ---- GGUF ----------------------------------------------------------------------------------------


def gguf_header_bit(path: Path, rng: random.Random) -> Corruption:
    return flipped(path, 0, _gguf_data_start(path), rng, visible=False)


def gguf_data_bit(path: Path, rng: random.Random) -> Corruption:
    return flipped(path, _gguf_data_start(path), path.stat().st_size, rng, visible=False)


def _gguf_data_start(path: Path) -> int:
    from sapwood.store.gguf_header import read_header

    return min(tensor.offset for tensor in read_header(path).tensors)


def gguf_counts(path: Path, rng: random.Random) -> Corruption:
    data = bytearray(path.read_bytes())
    position = rng.choice([4, 8, 16, 24])
    code = "<I" if position == 4 else "<Q"
    value = (
        rng.choice([0, 10**6, 2**31]) if position == 4 else rng.choice([10**6, 2**40, 2**64 - 1])
    )
    struct.pack_into(code, data, position, value)
    return Corruption(f"{value} at byte {position}", path.name, bytes(data))


def gguf_table(path: Path, rng: random.Random) -> Corruption:
    """One tensor's line of the table is wrong."""
    from sapwood.store.gguf_header import read_header

    data = bytearray(path.read_bytes())
    tensor = rng.choice(read_header(path).tensors)
    name = tensor.name.encode()
    start = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    num_dimensions = len(tensor.shape)
    kind = start + 4 + 8 * num_dimensions
    position, code, value = rng.choice(
        [
            (start, "<I", rng.choice([0, 5, 200, 2**32 - 1])),
            (start + 4, "<Q", rng.choice([0, 1, tensor.shape[-1] + 32, 2**62, 2**64 - 1])),
            (start + 4 + 8 * (num_dimensions - 1), "<Q", tensor.shape[0] + 32),
            (kind, "<I", rng.choice([3, 8, 12, 24, 26, 28, 1000, 2**31])),
            (kind + 4, "<Q", rng.choice([32 * 7, 33, 2**62, 2**64 - 32])),
            (start - 1, "<B", ord("%")),  # the last letter of its name
        ]
    )
    struct.pack_into(code, data, position, value)
    return Corruption(f"{tensor.name}: {value} at byte {position}", path.name, bytes(data))


def gguf_nested(path: Path, rng: random.Random) -> Corruption:
    """Metadata of arrays in arrays, or with an absurd number of elements."""
    depth = rng.choice([100, 50_000])
    nested = struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 0)
    absurd = struct.pack("<IQ", rng.choice([0, 4, 8]), rng.choice([2**33, 2**60]))
    key = b"x.y"
    body = rng.choice([nested, absurd])
    value = struct.pack("<Q", len(key)) + key + struct.pack("<I", 9) + body
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    return Corruption(f"nested {depth}", path.name, head + value + bytes(1 << 16))


# ---- PyTorch -------------------------------------------------------------------------------------


def pt_structure_bit(path: Path, rng: random.Random) -> Corruption:
    """In the archive's directory, in a member's header, or in the pickle: not in a tensor."""
    with zipfile.ZipFile(path) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        places = [
            (one.header_offset, one.header_offset + 30 + len(one.filename)) for one in members
        ]
        pickle = next(one for one in members if one.filename.endswith("data.pkl"))
        start = pickle.header_offset + 64
        places += 4 * [(start, start + pickle.file_size)]
        places += 4 * [(archive.start_dir, path.stat().st_size)]
    return flipped(path, *rng.choice(places), rng, visible=False)


def pt_data_bit(path: Path, rng: random.Random) -> Corruption:
    with zipfile.ZipFile(path) as archive:
        storages = [one for one in archive.infolist() if "/data/" in one.filename]
    one = max(storages, key=lambda member: member.file_size)
    end = one.header_offset + one.file_size
    return flipped(path, end - one.file_size // 2, end, rng, visible=False)


class _Touch:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("evil-was-here"),)


def pt_table(path: Path, rng: random.Random) -> Corruption:
    tensors = torch.load(path, weights_only=True)
    name = rng.choice(list(tensors))
    values: dict[str, Any] = {
        "wide": tensors[name][..., :1].expand_as(tensors[name]).new_empty(1).expand(2**30),
        "integers": tensors[name].to(torch.int32),
        "sparse": torch.ones(2, 2).to_sparse(),
        "number": 3,
        "code": _Touch(),
        "shape": tensors[name].unsqueeze(0),
    }
    kind = rng.choice(sorted(values))
    buffer = io.BytesIO()
    torch.save({**tensors, name: values[kind]}, buffer)
    return Corruption(f"{name} is {kind}", path.name, buffer.getvalue())


def pt_compressed(path: Path, rng: random.Random) -> Corruption:
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in archive.infolist():
            packed.writestr(member.filename, archive.read(member))
    return Corruption("compressed", path.name, buffer.getvalue())


def legacy_bit(path: Path, rng: random.Random) -> Corruption:
    return flipped(path, 0, min(path.stat().st_size, 4000), rng, visible=False)


# ---- configuration -------------------------------------------------------------------------------

_ODD: tuple[Any, ...] = ("x", -1, 0, 1.5, 2**31, 1e308, None, True, [], {}, [[]], {"a": {}})


_DETAILS = (
    *("rope_scaling", "rope_theta", "rms_norm_eps", "eos_token_id", "head_dim", "hidden_act"),
    *("max_position_embeddings", "num_attention_heads", "num_key_value_heads", "torch_dtype"),
    *("tie_word_embeddings", "sliding_window", "quantization_config", "temperature", "top_k"),
)


def config_field(path: Path, rng: random.Random) -> Corruption:
    config = json.loads(path.read_text())
    name = rng.choice(
        ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "architectures"]
    )
    # 1.5 and the like are no sizes; none of these is what it was.
    config[name] = rng.choice([one for one in _ODD if one is not True])
    return Corruption(f"{name}: {config[name]!r}", path.name, json.dumps(config).encode())


def config_detail(path: Path, rng: random.Random) -> Corruption:
    """Of fields that have defaults, or many right values: it may be served, or be refused."""
    config = json.loads(path.read_text())
    name = rng.choice(_DETAILS)
    config[name] = rng.choice(_ODD)
    what = f"{name}: {config[name]!r}"
    return Corruption(what, path.name, json.dumps(config).encode(), visible=False)


def json_nonsense(path: Path, rng: random.Random) -> Corruption:
    content = rng.choice([b"", b"[]", b"5", b"{", b"\xff\xfe{}", b"[" * 50_000, b'{"a":' * 50_000])
    return Corruption(f"{content[:10]!r}", path.name, content)


def json_bit(path: Path, rng: random.Random) -> Corruption:
    return flipped(path, 0, path.stat().st_size, rng, visible=False)


def draws(corrupt: Corrupt, path: Path, count: int, seed: int) -> Iterator[Corruption]:
    """`count` different corruptions of a file, the same ones for the same seed."""
    rng = random.Random(f"{seed} {corrupt.__name__} {path.name}")
    for _ in range(count):
        yield corrupt(path, rng)
