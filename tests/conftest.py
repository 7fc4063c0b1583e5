"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sapwood.base.errors import ModelSourceError
from sapwood.schema import env
from sapwood.store import ModelFiles, fetch_model
from tests.tiers import leave_out_long, load_profiles

if TYPE_CHECKING:
    from torch import Tensor

load_profiles()
CONNECTING = {"app", "bench", "docs", "e2e", "frontends", "gateway", "http"}
"""Folders of tests that open connections."""
# One compute thread per test process and per server that a test starts: the other cores have other
# tests. Tests about threads say how many they want.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SAPWOOD_NUM_THREADS", "1")

if not Path("/dev/nvidiactl").exists():
    # Without a GPU, Triton's interpreter runs its kernels. This must be said before anything
    # imports triton, and transformers does.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def share_certificate_authorities() -> None:
    """A client of httpx reads the machine's authorities when it is made, which takes longer than
    most tests that make a client: here all with the same options share what was read."""
    for library in ("httpx", "httpx2"):
        if find_spec(library) is not None:
            transports = import_module(f"{library}._transports.default")
            reading = transports.create_ssl_context
            transports.__dict__["create_ssl_context"] = cache(reading)


share_certificate_authorities()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--max-examples",
        type=int,
        default=2,
        help="cases per operation that the fuzzer of the OpenAPI document tries",
    )


@pytest.fixture(scope="module", autouse=True)
def nothing_stays_open(request: pytest.FixtureRequest) -> Iterator[None]:
    """A connection that a module's tests left open is found at its end, not in a later module."""
    yield
    if not CONNECTING.isdisjoint(request.path.parts):
        gc.collect()
        gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    leave_out_long(config.option.markexpr)


def pytest_collection() -> None:
    # Almost nothing that is made now goes before the end, and looking for it takes seconds.
    gc.disable()


def pytest_collection_finish() -> None:
    """Takes away what costs each of twenty thousand tests time, now that libraries are imported."""
    # Pytest attaches its handlers for each test to every logger that tells its parent nothing.
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True
    torch = sys.modules.get("torch")
    if torch is not None and not torch.cuda.is_available():
        # For each kind of device that is not there, torch would note from where it was seeded.
        torch.__dict__["manual_seed"] = torch.default_generator.manual_seed
    # What is there now stays to the end: frozen, it is not looked at each time that Python looks
    # for garbage.
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.enable()  # also after a collection that failed
    gc.unfreeze()  # or libraries report as lost what they would find at the end


@pytest.fixture(scope="session")
def smollm2_files() -> ModelFiles:
    """SmolLM2-135M from the user's own cache, pulled once if it is not there."""
    try:
        return fetch_model("smollm2-135m", home=env.home(env.environment()))
    except ModelSourceError as error:
        pytest.skip(f"SmolLM2 is neither cached nor to be had: {error}")


@pytest.fixture(scope="session")
def smollm2_logits(smollm2_files: ModelFiles) -> Callable[[Sequence[int]], Tensor]:
    """Token ids -> [n, vocab]: the logits of transformers' model in fp32, with our reading of the
    file. Its own takes 20 seconds; tests/models/loader/test_gguf.py compares the two."""
    from tests.smollm2 import transformers_model

    return transformers_model(smollm2_files)


@pytest.fixture(scope="session")
def minilm_files() -> ModelFiles:
    """all-MiniLM-L6-v2, likewise."""
    try:
        return fetch_model("all-minilm-l6-v2", home=env.home(env.environment()))
    except ModelSourceError as error:
        pytest.skip(f"all-MiniLM-L6-v2 is neither cached nor to be had: {error}")
