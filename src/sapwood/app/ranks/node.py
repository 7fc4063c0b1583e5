"""`sapwood serve --node-rank 1`: ranks of an engine whose scheduler is elsewhere."""

from __future__ import annotations

import logging
import queue
import sys
from functools import partial

from sapwood.app.ranks.ranks import start_ranks
from sapwood.base.process import end_in_order, watch
from sapwood.base.stopping import StopSignals
from sapwood.observe.log import configure_logging
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.parallel import split_address
from sapwood.schema.env import environment, home

log = logging.getLogger(__name__)

Ended = queue.SimpleQueue[tuple[int, str, int] | None]
"""Ranks that have ended: (rank, how, exit code); None: this command is told to end."""


def serve_node(engine: EngineConfig, *, log_level: str) -> int:
    """Run this machine's ranks until the engine ends, or SIGTERM or Ctrl-C; the exit code.

    The engine cannot go on without these ranks: it fails if they are stopped before it."""
    configure_logging(log_level)
    parallel = engine.parallel
    assert parallel.dist_init_addr is not None, "the configuration was checked"
    host, port = split_address(parallel.dist_init_addr)
    ended: Ended = queue.SimpleQueue()
    stop = StopSignals()
    stop.install()
    stop.act_with(lambda *_: ended.put(None))
    children = start_ranks(
        engine, host=host, port=port, home=home(environment()), log_level=log_level
    )
    for rank, child in children.items():
        watch(child, partial(_tell, ended, rank))
    log.info("ranks %s are for the engine at %s", [*children], parallel.dist_init_addr)
    code = 0
    for _ in children:
        found = ended.get()
        if found is None or found[2] != 0:
            code = 0 if found is None else 1
            if found is not None:
                sys.stderr.write(f"sapwood: the process of rank {found[0]} {found[1]}\n")
            break
    for child in children.values():
        end_in_order(child, 0.0)
    return code


def _tell(ended: Ended, rank: int, what: str, code: int) -> None:
    ended.put((rank, what, code))
