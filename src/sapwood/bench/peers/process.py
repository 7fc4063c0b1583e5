"""The comparison's side of a peer: a child process that runs workloads."""

from __future__ import annotations

import contextlib
import selectors
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import sapwood
from sapwood.base.clock import Clock, MonotonicClock
from sapwood.base.errors import EngineUnavailable
from sapwood.bench.offline import RunResult
from sapwood.bench.peers.compare import PeerFacts
from sapwood.bench.peers.interface import PeerSetup
from sapwood.bench.peers.messages import (
    Done,
    Failed,
    PeerRequest,
    Ready,
    Run,
    Start,
    decode_from_peer,
    encode,
)
from sapwood.bench.workloads.workload import Workload

CHILD = "sapwood.bench.peers.child"
CLOSE_TIMEOUT_S = 20.0
LOG_TAIL_BYTES = 2000
READ_BYTES = 1 << 16


def child_command(python: str | None) -> list[str]:
    """The command of a peer's process, for an interpreter that may lack sapwood.

    Then sapwood and its dependencies are taken from this environment, after the interpreter's own
    packages; both must have the same version of Python."""
    if python is None:
        return [sys.executable, "-m", CHILD]
    ours = [str(Path(sapwood.__file__).parents[1]), sysconfig.get_paths()["purelib"]]
    run = f"runpy.run_module({CHILD!r}, run_name='__main__')"
    return [python, "-c", f"import runpy, sys; sys.path += {ours!r}; {run}"]


class PeerProcess:
    """One peer with its model loaded. A context manager; leaving it ends the process.

    kind  the entry of PEERS that opens the peer; None: the peer's name

    start_s         seconds from the start of the process to its first answer
    peak_rss_bytes  peak of resident memory of the process and its children, up to the last run
    """

    def __init__(
        self,
        name: str,
        setup: PeerSetup,
        *,
        timeout_s: float,
        env: Mapping[str, str],
        kind: str | None = None,
        command: Sequence[str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.name = name
        self.versions: dict[str, str] = {}
        self.start_s = 0.0
        self.peak_rss_bytes = 0
        self._timeout_s = timeout_s
        self._clock = clock or MonotonicClock()
        self._buffer = bytearray()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        started_s = self._clock.now_s()
        self._process = subprocess.Popen(
            list(command or child_command(None)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            # Before numpy and torch load: their thread pools read this only once.
            env={**env, "OMP_NUM_THREADS": str(setup.num_threads)},
        )
        try:
            self._send(Start(peer=kind or name, setup=setup))
            ready = self._receive()
            if not isinstance(ready, Ready):
                raise self._failure(f"it answered {type(ready).__name__} instead of Ready")
            self.versions = ready.versions
            self._ask(Run(phases=[[PeerRequest(prompt_ids=[1, 2, 3, 4], num_output_tokens=1)]]))
        except BaseException:
            self.close()
            raise
        self.start_s = self._clock.now_s() - started_s

    def run(self, workload: Workload) -> RunResult:
        """Run a workload; EngineUnavailable if the process dies, fails or takes too long."""
        phases = [
            [
                PeerRequest(
                    prompt_ids=[int(token_id) for token_id in request.prompt],
                    num_output_tokens=request.num_output_tokens,
                )
                for request in phase
            ]
            for phase in workload.phases
        ]
        done = self._ask(Run(phases=phases))
        return RunResult(
            phase_s=tuple(done.phase_s),
            num_output_tokens=tuple(done.num_output_tokens),
            num_cached_tokens=tuple(done.num_cached_tokens),
        )

    def facts(self) -> PeerFacts:
        return PeerFacts(
            versions=self.versions, start_s=self.start_s, peak_rss_bytes=self.peak_rss_bytes
        )

    def close(self) -> None:
        """End the process by closing its input, and if that does not help by force."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # The child may have died already.
            process.stdin.close()
        try:
            process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, message: Run) -> Done:
        self._send(message)
        done = self._receive()
        if not isinstance(done, Done):
            raise self._failure(f"it answered {type(done).__name__} instead of Done")
        self.peak_rss_bytes = done.peak_rss_bytes
        return done

    def _send(self, message: Start | Run) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(encode(message) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failure("its process ended") from error

    def _receive(self) -> Ready | Done:
        line = self._read_line()
        if line is None:
            raise self._failure("its process ended without an answer")
        message = decode_from_peer(line)
        if isinstance(message, Failed):
            raise self._failure(message.message)
        return message

    def _read_line(self) -> bytes | None:
        """The next line; None at the end. A peer that hangs is killed: it would never answer."""
        stdout = self._process.stdout
        assert stdout is not None
        deadline_s = self._clock.now_s() + self._timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left_s = deadline_s - self._clock.now_s()
                if left_s <= 0 or not selector.select(left_s):
                    self._process.kill()
                    raise self._failure(f"it gave no answer within {self._timeout_s:g} s")
                data = stdout.read1(READ_BYTES)  # type: ignore[attr-defined]
                if not data:
                    return None
                self._buffer += data
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        return line

    def _failure(self, reason: str) -> EngineUnavailable:
        self._log.flush()
        size = self._log.seek(0, 2)
        self._log.seek(max(0, size - LOG_TAIL_BYTES))
        tail = self._log.read().decode("utf-8", "replace").strip()
        return EngineUnavailable(
            f"the peer {self.name} failed: {reason}" + (f"\nits log ends:\n{tail}" if tail else "")
        )
