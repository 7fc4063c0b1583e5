"""The process of one peer: `python -m sapwood.bench.peers.child`.

Reads messages from standard input and answers on standard output until the input ends. The clock
runs here, around the peer's own call, so that the pipe costs nothing.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import psutil

from sapwood.base.clock import Clock, MonotonicClock
from sapwood.bench.environment import package_versions
from sapwood.bench.offline import Generated, TokenGenerator
from sapwood.bench.peers.interface import PEERS
from sapwood.bench.peers.messages import Done, Failed, Ready, Run, Start, decode_to_peer, encode

PEER_PACKAGES = (
    "sapwood",
    "torch",
    "transformers",
    "llama-cpp-python",
    "openvino-genai",
    "vllm",
)


def main() -> int:
    # Libraries print to standard output; they get standard error, and the messages a copy.
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        return serve(sys.stdin.buffer, answers, MonotonicClock())


def serve(lines: Iterable[bytes], answers: BinaryIO, clock: Clock) -> int:
    """Answer each line. Returns the exit status, which is 1 after a failure; the parent is told."""
    incoming = iter(lines)
    try:
        start = decode_to_peer(next(incoming))
        if not isinstance(start, Start):
            raise TypeError(f"the first message must be Start, not {type(start).__name__}")
        with PEERS.get(start.peer)(start.setup) as generator:
            _answer(answers, Ready(versions=package_versions(PEER_PACKAGES)))
            for line in incoming:
                message = decode_to_peer(line)
                if not isinstance(message, Run):
                    raise TypeError(f"expected Run, not {type(message).__name__}")
                _answer(answers, _run(generator, message, clock))
    except Exception as error:  # noqa: BLE001 - whatever a peer raises ends its process, reported
        traceback.print_exc()
        _answer(answers, Failed(message=f"{type(error).__name__}: {error}"))
        return 1
    return 0


def _run(generator: TokenGenerator, message: Run, clock: Clock) -> Done:
    phase_s: list[float] = []
    generated: list[Generated] = []
    for phase in message.phases:
        prompts = [request.prompt_ids for request in phase]
        lengths = [request.num_output_tokens for request in phase]
        start_s = clock.now_s()
        outputs = generator.generate(prompts, lengths)
        phase_s.append(clock.now_s() - start_s)
        generated += outputs
    return Done(
        phase_s=phase_s,
        num_output_tokens=[output.num_output_tokens for output in generated],
        num_cached_tokens=[output.num_cached_tokens for output in generated],
        peak_rss_bytes=peak_rss_bytes(psutil.Process()),
    )


def peak_rss_bytes(process: psutil.Process) -> int:
    """Greatest resident memory since the start, summed over a process and its children.

    The peaks need not fall together, so this is an upper bound where there are children.
    """
    return sum(_peak_of(member) for member in [process, *process.children(recursive=True)])


def _peak_of(process: psutil.Process) -> int:
    try:
        status = Path(f"/proc/{process.pid}/status")
        if status.is_file():
            for line in status.read_text(encoding="utf-8").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return int(process.memory_info().rss)
    except (OSError, psutil.Error):
        return 0  # The child ended after it was listed, and holds no memory.


def _answer(answers: BinaryIO, message: Ready | Done | Failed) -> None:
    answers.write(encode(message) + b"\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
