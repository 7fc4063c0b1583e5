"""Build a module of C for the gateway: python docs/wasm/build.py label.c /tmp/label.wasm

Needs clang and its linker (Debian's packages clang and lld) and `pip install wasmtime`. The
component around the compiled code is label.wat's, whose own code is exchanged: so the C file must
export what the code of label.wat exports.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from wasmtime import wat2wasm

COMPILE = (
    *("clang", "--target=wasm32", "-O2", "-Wall", "-Werror"),
    *("-ffreestanding", "-nostdlib", "-Wl,--no-entry"),
)
NUM_HEADER_BYTES = 8
CORE_MODULE = 1


def main(source: str, target: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        compiled = Path(directory, "code.wasm")
        subprocess.run([*COMPILE, "-o", str(compiled), source], check=True)
        code = compiled.read_bytes()
    around = wat2wasm(Path(__file__).with_name("label.wat").read_text("utf-8"))
    Path(target).write_bytes(with_code(bytes(around), code))


def with_code(component: bytes, code: bytes) -> bytes:
    """The component with another core module in place of its own."""
    parts = [component[:NUM_HEADER_BYTES]]
    for kind, content in sections(component):
        content = code if kind == CORE_MODULE else content
        parts += [bytes([kind]), spelled(len(content)), content]
    return b"".join(parts)


def sections(component: bytes) -> Iterator[tuple[int, bytes]]:
    """The kind and the content of each section."""
    at = NUM_HEADER_BYTES
    while at < len(component):
        kind, length, shift = component[at], 0, 0
        while True:  # the length, in LEB128
            at += 1
            length |= (component[at] & 0x7F) << shift
            shift += 7
            if component[at] < 0x80:
                break
        yield kind, component[at + 1 : at + 1 + length]
        at += 1 + length


def spelled(number: int) -> bytes:
    """A number in LEB128."""
    told = bytearray()
    while number >= 0x80:
        told.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*told, number])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
